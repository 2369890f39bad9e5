"""Methods about the samples: which ones a pass sees, and what they weigh."""
