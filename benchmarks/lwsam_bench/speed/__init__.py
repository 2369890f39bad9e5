"""What a step costs: FLOPs, time, memory and compiling, measured or traced."""
