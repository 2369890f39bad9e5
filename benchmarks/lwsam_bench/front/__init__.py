"""What a newcomer meets, from committed rows: the first pages, and the demo."""
