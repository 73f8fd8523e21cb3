"""The names of `flowcache.bench.prompts` that scripts import from here."""

from flowcache.bench.prompts import Run, from_physics_iq

__all__ = ["Run", "from_physics_iq"]
