"""What replicas on several hosts need beyond those of one: who is there, what was begun, where it is kept."""
