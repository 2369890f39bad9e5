"""Datasets: read, decoded, corrupted, and cut into the batches of a step."""
