"""The train step: its executables, its budget, its devices."""
