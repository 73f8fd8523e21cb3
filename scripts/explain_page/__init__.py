"""The parts of the page that `scripts/explain.py` writes."""
