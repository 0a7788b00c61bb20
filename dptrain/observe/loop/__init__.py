"""What a loop tells the meter of its steps, and what is found out in its place."""
