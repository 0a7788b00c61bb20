"""The parts of `benchmarks.time_to_target`: what is trained until it reaches a loss, by whom, and how it is judged."""
