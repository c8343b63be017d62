"""Tests by kind; a package, since another distribution installs a top-level `tests` of its own."""
