"""Objects under a root: one interface over a local folder and S3."""
