"""Gathers the pages of the documentation site; `make docs` builds the site from them."""
