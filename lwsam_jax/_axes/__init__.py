"""The five axes of perturbed training: which, ascent, shape, combine, when."""
