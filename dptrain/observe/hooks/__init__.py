"""Where a replica's own gradient is seen before it is combined with the others'."""
