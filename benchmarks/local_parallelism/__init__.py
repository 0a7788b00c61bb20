"""The parts of `benchmarks.local_parallelism`: losses of trained models, and two processes that hold a stage each."""
