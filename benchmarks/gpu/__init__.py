"""The parts of `benchmarks.gpu_day`, one question each."""
