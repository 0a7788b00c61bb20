"""The parts of `benchmarks.mistakes`: files with mistakes, and what the command makes of each."""
