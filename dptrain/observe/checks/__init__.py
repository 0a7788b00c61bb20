"""What notices that a reading would be wrong."""
