"""The processes of a run: launcher, restart policy, rendezvous, signals, watchdog, step reduction, step timer."""
