"""What a dataset is, what is wrong with it, and its repair."""
