"""Prompts for parts of a video: each holds from a latent frame on.

    scenes_of("a cat || 120: a dog")        # [(0, "a cat"), (120, "a dog")]

A prompt begins with the first chunk at its frame or later. The keys of chunks before that one were
made with the old prompt; those of the newest may be made anew.
"""

import re
from collections.abc import Sequence
from typing import TypeAlias

from flowcache.errors import UserError
from flowcache.runtime.config import check_prompt

SWITCH = re.compile(r"\s*\|\|\s*(\d{1,7}):\s*")
"""In a text, what stands before the prompt of later latent frames."""
RECACHED_FRAMES = 12
"""Newest latent frames whose keys are made anew when a prompt begins. Source: LongLive's window."""

Scenes: TypeAlias = list[tuple[int, str]]
"""Latent frames and the prompts that hold from them on."""


def scenes_of(prompt: str) -> Scenes:
    """Return the prompts in a text."""
    first, *later = SWITCH.split(prompt)
    return [(0, first), *((int(at), text) for at, text in zip(*[iter(later)] * 2, strict=True))]


def check_scenes(scenes: Scenes) -> None:
    """Check that prompts follow each other and say something."""
    places = [at for at, _ in scenes]
    if not places or places[0] != 0 or places != sorted({*places}):
        raise UserError(
            f"prompts begin at the latent frames {places}: the first must begin at 0, and each "
            "later than the one before"
        )
    for at, text in scenes:
        check_prompt("prompt" if at == 0 else f"the prompt of latent frame {at}", text)


def switches_of(
    scenes: Scenes, *, chunks: Sequence[range], generated: Sequence[int]
) -> tuple[int, ...]:
    """Return the chunks with which the later prompts begin."""
    switches = list[int]()
    for at, _ in scenes[1:]:
        first = next((chunk for chunk in generated if chunks[chunk].start >= at), None)
        if first is None or first in switches:
            raise UserError(
                f"the prompt of latent frame {at} begins with no chunk of its own: chunks have "
                f"{len(chunks[-1])} latent frames, the last one begins at {chunks[-1].start}"
            )
        switches.append(first)
    return tuple(switches)


def recached(chunk: int, *, chunks: Sequence[range], whole: int) -> Sequence[int]:
    """Return the chunks before one with another prompt whose keys are made anew.

    Example: 20 whole frames behind a sink of one, chunks of 3: chunk 7 has 3..6 made anew, which
    are 12 frames.

    Args:
        whole: newest clean frames that are held without a gap.
    """
    most, first = min(RECACHED_FRAMES, whole), chunk
    while first and sum(len(own) for own in chunks[first - 1 : chunk]) <= most:
        first -= 1
    return range(first, chunk)


def scene_lines(scenes: Scenes, *, recaches: bool) -> list[str]:
    """Return a line on prompts that begin later, if there are some."""
    _, *later = scenes
    if not later:
        return []
    places = ", ".join(str(at) for at, _ in later)
    how = ", with the keys of the newest frames made anew" if recaches else ""
    return [f"prompts      {1 + len(later)}, the others from latent frame {places}{how}"]
