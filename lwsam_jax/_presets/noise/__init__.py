"""Methods that perturb along noise: no ascent, and so the price of a plain gradient."""
