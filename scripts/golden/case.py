"""A file of reference tensors, and what comes out of comparing our code with it."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "weights."


@dataclass(frozen=True)
class Check:
    """One comparison."""

    what: str
    error: float
    """Largest absolute difference, or number of entries that differ; not finite where nothing could
    be compared."""
    tolerance: float
    status: Literal["pass", "fail", "known"]
    reason: str = ""
    """Why the check failed, or why a difference is known."""


@dataclass
class Case:
    """One file: its settings and tensors."""

    name: str
    """Path below the folder that is checked, without its ending."""
    settings: dict[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    unread: set[str] = field(init=False)
    """Tensors that no check has looked at yet."""

    def __post_init__(self) -> None:
        self.unread = set(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def has(self, ending: str) -> bool:
        """Return whether a tensor's name ends like this."""
        return any(name.endswith(ending) for name in self.tensors)

    def names(self, prefix: str) -> list[str]:
        """Return the names of the tensors that begin like this, sorted."""
        return sorted(name for name in self.tensors if name.startswith(prefix))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor and note that it was looked at."""
        if name not in self.tensors:
            raise ValueError(f"the file has no tensor {name}")
        self.unread.discard(name)
        return self.tensors[name]

    def weights(self) -> dict[str, Tensor]:
        """Return the model's weights by their official keys."""
        return {name.removeprefix(WEIGHTS): self.tensor(name) for name in self.names(WEIGHTS)}


@dataclass(frozen=True)
class Kind:
    """A kind of case file."""

    name: str
    recognises: Callable[[Case], bool]
    """By the settings and the names of the tensors; never by the path."""
    run: Callable[[Case], Iterator[Check]]
    """Compares everything in the file with our code."""


def read_case(path: Path, *, folder: Path) -> Case:
    """Read a `.safetensors` or `.json` case file."""
    name = str(path.relative_to(folder).with_suffix(""))
    try:
        if path.suffix == ".json":
            return Case(name, _as_settings(path.read_text(encoding="utf-8")))
        with safe_open(path, "pt") as file:
            settings = _as_settings((file.metadata() or {}).get("case", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't be read ({error})") from error
    return Case(name, settings, tensors)


def _as_settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its settings are no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError("it holds no settings (a JSON object, in the metadata key case)")
    return settings


def compare(what: str, ours: Tensor, stored: Tensor, *, tolerance: float) -> Check:
    """Compare two tensors entry by entry; another shape or NaN fails."""
    if ours.shape != stored.shape:
        shapes = f"ours is {list(ours.shape)}, the reference {list(stored.shape)}"
        return Check(what, math.inf, tolerance, "fail", shapes)
    error = 0.0
    if ours.numel():
        error = (ours.double() - stored.double()).abs().max().item()
    return Check(what, error, tolerance, "pass" if error <= tolerance else "fail")


def compare_sets(what: str, ours: Collection[Any], stored: Collection[Any]) -> Check:
    """Count the entries that only one side has; any fails."""
    differing = set(ours) ^ set(stored)
    reason = f"differing: {sorted(differing)[:3]}" if differing else ""
    return Check(what, float(len(differing)), 0.0, "fail" if differing else "pass", reason)


def known(check: Check, reason: str) -> Check:
    """Mark a difference that the reference's own defect explains.

    Args:
        check: a comparison that must hold for the explanation to be true.
    """
    if check.status == "fail":
        return check
    return Check(check.what, check.error, check.tolerance, "known", reason)


def by_head(indices_KG: Tensor) -> set[tuple[int, int]]:
    """Return the kept tokens as (head, token)."""
    return {(head, index) for head, kept in enumerate(indices_KG.T.tolist()) for index in kept}
