"""Families of metrics that need no model of their own."""
