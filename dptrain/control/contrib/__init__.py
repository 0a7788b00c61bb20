"""Laws that are kept for comparison."""
