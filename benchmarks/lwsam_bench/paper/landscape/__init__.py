"""Figures 2 and 6: the loss around a trained network."""
