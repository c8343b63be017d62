"""The index of latents: built from a dataset and an SAE, read by the site."""
