"""The names of `flowcache.bench.tasks` that scripts import from here."""

from flowcache.bench.tasks import Run, from_physics_iq

__all__ = ["Run", "from_physics_iq"]
