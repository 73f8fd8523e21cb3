"""The demo world: drawn clips, captions, a judge, and what trains a tiny model on them."""
