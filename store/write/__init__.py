"""Writing a dataset: plan, tokens, units, seal."""
