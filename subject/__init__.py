"""The subject model: loaded, read at hooks, run with activations replaced, made to generate."""
