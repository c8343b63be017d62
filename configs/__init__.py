"""Configs to copy: data files, installed with the package."""
