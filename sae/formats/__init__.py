"""Other libraries' files for sparse autoencoders: a file a format; `convert` is the way in."""
