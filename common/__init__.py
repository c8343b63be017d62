"""Small helpers that every room may use: files, cores, devices, hashing, reports."""
