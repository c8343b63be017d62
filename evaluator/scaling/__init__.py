"""Scaling laws of a sweep."""
