"""The sentences and tables of a report and of a plan."""
