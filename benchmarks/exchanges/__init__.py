"""The parts of `benchmarks.exchange`, one question each."""
