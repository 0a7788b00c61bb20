"""The parts of `benchmarks.accuracy`: problems whose noise is known, wrappers, and what is measured of them."""
