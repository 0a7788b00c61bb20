"""The parts of `benchmarks.hosts`: hosts on one machine, a run on three of them, and what can happen to it."""
