"""The parts of `benchmarks.prediction`: problems of all sizes, charted from critical batch to noise scale."""
