"""The parts of `benchmarks.faults`: a run under fire, checkpoints under fire, and what care costs."""
