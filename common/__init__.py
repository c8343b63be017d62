"""Helpers that every room may use."""
