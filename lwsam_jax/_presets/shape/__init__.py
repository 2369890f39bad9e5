"""Methods about HOW the perturbation is formed from its direction."""
