"""The parts of `benchmarks.learners`: the arms of each way, their runs, and the gradients of experts."""
