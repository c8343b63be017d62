"""Ray: a crew of actors that comes and goes with its nodes."""
