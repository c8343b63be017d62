"""Helpers that every room may use; they need the standard library only."""
