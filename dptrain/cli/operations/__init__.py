"""Sub-commands around a run instead of in it."""
