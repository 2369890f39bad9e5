"""Methods side by side on small data: the demo, and precisions."""
