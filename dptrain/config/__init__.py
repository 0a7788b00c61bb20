"""The settings of a run: gathered, read, validated, and filled in."""
