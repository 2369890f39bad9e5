"""Precisions side by side on small data."""
