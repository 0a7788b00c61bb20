"""What a run writes and shows: run folder, JSONL log, console, trackers, redaction of secrets."""
