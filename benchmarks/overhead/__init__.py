"""The parts of `benchmarks.overhead`: the models, and the ways to take the same step that are timed in turns."""
