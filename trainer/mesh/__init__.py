"""Processes that train one SAE together: the mesh, what crosses it, and a shard of the latents."""
