"""The meter and the controllers inside other people's loops: `accelerate`, `lightning` and `transformers`.

Each file imports its framework, so none is imported from here: `from dptrain.integrations.lightning import …`.
"""
