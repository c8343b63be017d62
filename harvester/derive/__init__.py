"""Datasets made from datasets."""
