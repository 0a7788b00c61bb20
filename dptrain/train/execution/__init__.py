"""How a step runs on the device: wrapping, precision, copies, and the update of the parameters."""
