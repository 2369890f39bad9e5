"""Theorem 1, measured on a problem whose constants are known."""
