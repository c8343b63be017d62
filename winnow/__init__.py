"""From a language model's activations to sparse, readable features."""
