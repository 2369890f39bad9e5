"""Methods about WHICH layers are perturbed."""
