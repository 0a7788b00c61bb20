"""The parts of `benchmarks.frontier`: problems whose steps to a target are known exactly."""
