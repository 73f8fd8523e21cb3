"""What is shown in the clips that are tuned on, and in those that the result is checked with."""

import random
from collections.abc import Sequence
from pathlib import Path

from flowcache.demo.clips import split_attributes
from flowcache.errors import UserError
from flowcache.runtime.text_files import read_lines
from flowcache.tune.measure import Prompt
from flowcache.tune.runs import DEMOS

CALIBRATION_SEED, CHECK_SEED = 7000, 8000
ORDER_SEED = 0


def choose_prompts(
    path: Path | None, *, checkpoint: str, num_clips: int, num_checks: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to calibrate on and those to check with.

    Args:
        path: a text file with a prompt per line; None: the demo's captions, those to check with
            from the combinations that it was not trained on.

    Raises:
        UserError: there are too few, or none.
    """
    for name, count, least in (("--clips", num_clips, 1), ("--check-prompts", num_checks, 0)):
        if count < least:
            raise UserError(f"{name} must be {least} or more, not {count}")
    if path is not None:
        texts = read_prompts(path, needed=num_clips + num_checks)
        seen, unseen = texts[:num_clips], texts[num_clips:]
    elif checkpoint in DEMOS:
        seen, unseen = ([attributes.caption for attributes in part] for part in split_attributes())
        random.Random(ORDER_SEED).shuffle(seen)
        random.Random(ORDER_SEED).shuffle(unseen)
    else:
        raise UserError(
            f"{checkpoint} needs prompts to be tuned on: give --prompts FILE, one per line"
        )
    return numbered(seen, num_clips, CALIBRATION_SEED), numbered(unseen, num_checks, CHECK_SEED)


def numbered(texts: Sequence[str], count: int, first_seed: int) -> list[Prompt]:
    """Return so many prompts, repeated with other seeds if there are fewer texts."""
    return [Prompt(i, texts[i % len(texts)], first_seed + i) for i in range(count)]


def read_prompts(path: Path, *, needed: int) -> list[str]:
    """Read a prompt per line.

    Raises:
        UserError: the file can't be read, or holds too few.
    """
    texts = read_lines(path)
    if len(texts) < needed:
        raise UserError(
            f"{path} holds {len(texts)} prompts, but {needed} are needed: add some, or lower "
            "--clips or --check-prompts"
        )
    return texts
