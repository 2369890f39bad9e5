"""Methods that perturb nothing: terms of a loss, and a scaling of weights."""
