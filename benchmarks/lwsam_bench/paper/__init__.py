"""The evaluation of the layer-wise SAM paper, one module for a kind of result."""
