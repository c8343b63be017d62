"""Reading a dataset, checked: rows by place, and streams in the order of lanes."""
