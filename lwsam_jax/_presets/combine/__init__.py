"""Methods about WHAT both gradients become for the base optimizer."""
