"""Methods about FROM WHAT the perturbation comes."""
