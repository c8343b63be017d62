"""What says that data is there: receipts, manifest and its parts."""
