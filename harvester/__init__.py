"""From text to activations: corpus, plan, subject model, harvest."""
