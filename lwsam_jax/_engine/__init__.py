"""The traced loss: trace, inline, cut, run; layers, depth, cost."""
