"""The second stage: sparse autoencoders, trained from a dataset's rows."""
