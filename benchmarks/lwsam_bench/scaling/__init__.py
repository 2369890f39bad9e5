"""FLOPs and bytes of a step by the number of devices and processes, from compiled HLO."""
