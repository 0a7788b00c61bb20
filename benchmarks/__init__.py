"""One question per script; `results/` holds the answers."""
