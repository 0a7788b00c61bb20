"""The figures of a report and of a plan."""
