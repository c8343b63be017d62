"""From plan to stored activations: driver, workers, ledger."""
