"""The budgets of the table of reuse rules: their FLOPs, and what each rule needs to meet them."""

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from flowcache.errors import UserError
from flowcache.runtime.config import load_config
from flowcache.runtime.files import write_text

BUDGETS_FILE = "budgets.yaml"
LOW, MID, HIGH = "low", "mid", "high"
LEVELS = {LOW: 0.6, MID: 1.0, HIGH: 1.3}
"""Budget -> its FLOPs as a multiple of FlowCache-fast's."""
MAKE_WITH = "scripts/tune_budgets.py"


@dataclass(frozen=True)
class Adaptive:
    """An adaptive rule at one budget."""

    rule: str
    """flowcache, content, teacache or magcache."""
    level: str
    threshold: float | None
    """None: that of the preset."""
    flops: float
    """Share of the FLOPs of every step, measured on calibration clips."""
    factor: float
    """Of an extrapolated velocity: what suits the steps that the rule computes."""


@dataclass(frozen=True)
class Level:
    """One budget."""

    flops: float
    """Most FLOPs, as a share of those of every step."""
    profile: str
    """File beside the budgets."""
    even_steps: list[int]
    """As many own steps as the plan computes, evenly spread."""
    even_factor: float
    """Of an extrapolated velocity, for the even steps."""
    parabola_factor: float
    """Of a velocity that is extrapolated with order 2, for the plan."""


@dataclass(frozen=True)
class Budgets:
    """What `scripts/tune_budgets.py` has found out."""

    command: str
    model: str
    checkpoint: str
    settings: list[str]
    levels: dict[str, Level]
    adaptive: list[Adaptive]

    def rule(self, name: str, level: str) -> Adaptive:
        """Return an adaptive rule at one budget."""
        (found,) = (each for each in self.adaptive if (each.rule, each.level) == (name, level))
        return found


def write_budgets(budgets: Budgets, folder: Path) -> Path:
    """Write the budgets and return where they are.

    Raises:
        UserError: the file can't be written.
    """
    path = folder / BUDGETS_FILE
    head = f"# Made by {MAKE_WITH}; change nothing here: make it again.\n"
    write_text(path, head + yaml.safe_dump(asdict(budgets), sort_keys=False, width=100))
    return path


def read_budgets(folder: Path | None, *, model: str, checkpoint: str) -> Budgets:
    """Read the budgets of a folder, which were made for this model.

    Raises:
        UserError: none is named, they are missing or damaged, or belong to another model.
    """
    if folder is None:
        raise UserError(f"--table reuse needs --profiles DIR: a folder that {MAKE_WITH} made")
    path = folder / BUDGETS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file: make it with {MAKE_WITH} --out {folder}")
    budgets = load_config(Budgets, [path])
    if (budgets.model, budgets.checkpoint) != (model, checkpoint):
        raise UserError(
            f"{path} was made for {budgets.model} {budgets.checkpoint}, not for {model} "
            f"{checkpoint}: choose another --profiles"
        )
    if set(budgets.levels) != set(LEVELS):
        raise UserError(f"{path} must have the levels {', '.join(LEVELS)}: make it again")
    return budgets
