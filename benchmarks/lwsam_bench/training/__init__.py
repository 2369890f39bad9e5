"""A training run: its configuration, its steps, its checkpoints and its rows."""
