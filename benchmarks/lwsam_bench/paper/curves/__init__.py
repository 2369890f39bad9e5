"""Figures 1, 3, 4 and 5: what happens in training."""
