"""Family `probes`: one latent against a binary task."""
