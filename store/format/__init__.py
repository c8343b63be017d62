"""The stored format, pure: keys, grid, order of rows, shards, zarr metadata."""
