"""Reading what latents mean: an index of examples, a local web page, steering and monitoring."""
