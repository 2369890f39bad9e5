"""Where a step runs: one device, the local ones by pmap, or those of a mesh."""
