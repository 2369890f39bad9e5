"""Methods side by side on small data: the demo, and accuracy over cost."""
