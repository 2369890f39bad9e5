"""What can be measured of a loss at its parameters, apart from any step."""
