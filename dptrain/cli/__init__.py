"""Sub-commands and nothing else."""
