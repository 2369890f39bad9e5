"""One protocol that tunes all methods alike, and its rows."""
