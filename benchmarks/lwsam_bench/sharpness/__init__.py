"""How sharp the loss of a trained network is."""
