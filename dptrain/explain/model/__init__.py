"""Fits and predictions from a run or a sweep: frontier, placement, plan."""
