"""Table 2: images a second of each method."""
