"""From corpus to plan: documents, tokens, windows."""
