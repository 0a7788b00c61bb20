"""Devices that a plan may be for: those of the run, those of a list, and what renting them costs."""
