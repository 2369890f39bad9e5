"""Methods about WHEN an ascent is taken."""
