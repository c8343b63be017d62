"""Family `judge`: explanations in words, by a language model."""
