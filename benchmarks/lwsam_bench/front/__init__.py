"""The tables of the README, from committed rows."""
