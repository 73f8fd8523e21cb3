"""What the comparison needs of a model, whichever it is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from flowcache.runtime.run import Clip

REFERENCE = "vanilla"
"""The method that every other one is compared with; each family has one of this name."""


@dataclass(frozen=True)
class Group:
    """Where a row of the table of reuse rules belongs."""

    policy: str
    predictor: str
    level: str
    """Its budget."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    preset: str
    overrides: tuple[str, ...] = ()
    base: str | None = None
    """A second method that this one is compared with."""
    group: Group | None = None


@dataclass(frozen=True)
class Source:
    """What all methods are run with."""

    checkpoint: str
    settings: tuple[str, ...]
    folder: Path
    """Where a run may write."""

    def overrides(self, method: Method) -> list[str]:
        """Return the changes of a preset for a method; the prompt stands for a later one."""
        return [*self.settings, *method.overrides, "prompt=-"]


class Prepared(Protocol):
    """What is known of a checked request."""

    @property
    def config(self) -> Any:
        """All settings, a dataclass."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it will run."""
        ...


Job = TypeVar("Job", bound=Prepared)
Models = TypeVar("Models")


@dataclass(frozen=True)
class Family(Generic[Job, Models]):
    """A model's part of the comparison.

    Attributes:
        methods: rows of the table; a method stands below those that it is compared with.
        base_label: says in the table's head what the second comparison is with.
        prepare: checks a method's settings; raises `UserError` if it can't be run.
        load: loads what all methods share.
        render: makes the clip of a prompt and a seed.
    """

    methods: tuple[Method, ...]
    base_label: str
    prepare: Callable[[Method, Source], Job]
    load: Callable[[Job], Models]
    render: Callable[[Job, Models, str, int], Clip]

    def chosen(self, names: Iterable[str]) -> list[Method]:
        """Return methods by name and those that they are compared with, in the table's order."""
        wanted = {REFERENCE, *names}
        wanted |= {m.base for m in self.methods if m.name in wanted and m.base is not None}
        return [method for method in self.methods if method.name in wanted]
