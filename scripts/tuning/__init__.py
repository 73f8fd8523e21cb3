"""The parts of `scripts/tune.py`."""
