"""What the rows of a tuning say, in tables, sentences and plots."""
