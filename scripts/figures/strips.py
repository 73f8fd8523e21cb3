"""Frames of one prompt and seed, made with several methods on a demo checkpoint."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmark.family import Family, Source
from benchmark.work import unseen_prompts
from PIL import Image, ImageDraw, ImageFont

from flowcache.runtime.metrics import psnr
from flowcache.runtime.run import Clip

NUM_SHOWN = 7
"""Frames of each clip in the picture."""
FRAME = 112
"""Width and height of a frame in the picture, pixels."""
GAP, MARGIN, LABEL_WIDTH, TITLE_HEIGHT = 6, 16, 172, 44
INK, SOFT, PAGE = "#1c1e21", "#545b63", "#ffffff"
NAME_SIZE, NOTE_SIZE = 18, 15


@dataclass(frozen=True)
class Strip:
    """A row of the picture."""

    name: str
    method: str
    """Its name in the table of `bench_demo.py`."""


@dataclass(frozen=True)
class Labelled:
    """The clip of a row, and what stands beside it."""

    name: str
    notes: Sequence[str]
    clip: Clip


def draw_strips(
    family: Family[Any, Any], strips: Sequence[Strip], *, settings: Sequence[str], index: int
) -> bytes:
    """Make clips of an unseen prompt, and return a PNG of their frames.

    Args:
        strips: rows from top to bottom; the others are compared with the first one.
        settings: of all methods, as in `num_frames=97`.
        index: of the prompt in the table of `bench_demo.py`.

    Raises:
        UserError: a method can't be run.
    """
    attributes, seed = unseen_prompts(index + 1)[index]
    methods = {method.name: method for method in family.methods}
    with TemporaryDirectory() as folder:
        source = Source("demo", tuple(settings), Path(folder))
        jobs = [family.prepare(methods[strip.method], source) for strip in strips]
        models = family.load(jobs[0])
        clips = [family.render(job, models, attributes.caption, seed) for job in jobs]
    rows = [
        Labelled(strip.name, describe(clip, clips[0]), clip)
        for strip, clip in zip(strips, clips, strict=True)
    ]
    buffer = io.BytesIO()
    compose(rows, title=f"{attributes.caption}, seed {seed}").save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def describe(clip: Clip, reference: Clip) -> list[str]:
    """Return the share of computed chunk passes, and the distance from the reference."""
    stats = clip.stats
    share = stats.num_computed / (stats.num_computed + stats.num_reused)
    notes = [f"{100 * share:.0f} % computed"]
    if clip is not reference:
        notes.append(f"{psnr(clip.frames, reference.frames):.1f} dB")
    return notes


def compose(rows: Sequence[Labelled], *, title: str) -> Image.Image:
    """Put a row of frames per clip below one another, from the first frame to the last.

    The page is opaque, so that the picture can be read on any ground.
    """
    width = MARGIN + LABEL_WIDTH + NUM_SHOWN * (FRAME + GAP) - GAP + MARGIN
    height = TITLE_HEIGHT + len(rows) * (FRAME + GAP) - GAP + MARGIN
    page = Image.new("RGB", (width, height), PAGE)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 13), title, fill=INK, font=ImageFont.load_default(NAME_SIZE))
    for index, row in enumerate(rows):
        top = TITLE_HEIGHT + index * (FRAME + GAP)
        pen.text((MARGIN, top + 22), row.name, fill=INK, font=ImageFont.load_default(NAME_SIZE))
        for line, note in enumerate(row.notes):
            place = (MARGIN, top + 48 + 20 * line)
            pen.text(place, note, fill=SOFT, font=ImageFont.load_default(NOTE_SIZE))
        last = len(row.clip.frames) - 1
        for column in range(NUM_SHOWN):
            frame = row.clip.frames[round(last * column / (NUM_SHOWN - 1))].numpy()
            picture = Image.fromarray(frame).resize((FRAME, FRAME), Image.Resampling.BICUBIC)
            page.paste(picture, (MARGIN + LABEL_WIDTH + column * (FRAME + GAP), top))
    return page
