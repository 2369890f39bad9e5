"""The commands that measure: what a step costs, what a network or a number is worth."""
