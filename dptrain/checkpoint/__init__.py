"""Tensors and state to disk and back: manifest, verification, asynchronous writer."""
