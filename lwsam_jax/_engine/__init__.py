"""The traced loss: trace, peel, cut, run; layers, stacks, depth, cost."""
