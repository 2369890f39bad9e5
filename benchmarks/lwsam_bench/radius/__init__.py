"""`find_rho` against the full grid of radii."""
