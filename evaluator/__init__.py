"""Metrics of a trained SAE; they run the subject model and read finished datasets."""
