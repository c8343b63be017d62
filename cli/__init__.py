"""The `winnow` command: a file for each group of commands."""
