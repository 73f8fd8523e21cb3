"""Compares the caching methods of a model on its demo: what is compared, measured and shown."""
