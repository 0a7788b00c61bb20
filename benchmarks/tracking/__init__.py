"""The parts of `benchmarks.tracking`: simulated courses, other estimates, real trainings beside their exact noise."""
