"""Recovery of known directions."""
