"""Which experts, on which rank: selection, placement, traffic counts. Pure torch and numpy, no processes."""
