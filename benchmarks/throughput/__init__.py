"""The parts of `benchmarks.throughput`: the same step in several frameworks, and its turns."""
