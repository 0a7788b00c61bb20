"""The parts of `benchmarks.plan`: trainings to a loss, in processes of their own."""
