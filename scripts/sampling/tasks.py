"""The names of `flowcache.bench.tasks` that scripts import from here."""

from flowcache.bench.tasks import Task

__all__ = ["Task"]
