"""One run of a tuning: what is learned, by which optimizer, and how it is judged."""
