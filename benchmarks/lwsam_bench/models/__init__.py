"""The networks that are trained, one file for each family."""
