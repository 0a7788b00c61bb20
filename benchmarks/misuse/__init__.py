"""The parts of `benchmarks.misuse`: training loops drawn at random, correct or misused."""
