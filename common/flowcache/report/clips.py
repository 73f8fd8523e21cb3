"""Pictures of clips: rows of frames, and a moving picture of several clips side by side."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from flowcache.runtime.metrics import psnr
from flowcache.runtime.run import Clip

NUM_COLUMNS = 7
"""Frames of each clip in a picture of rows."""
FRAME = 112
"""Width and height of a frame there, pixels."""
GAP, EDGE, LABEL_WIDTH, TITLE_HEIGHT = 6, 16, 172, 44
INK, SOFT, PAGE, BAR = "#e9ebed", "#a8b0b8", "#14171a", "#56b4e9"
"""A dark page, as a player's: one picture for light and for dark mode."""
NAME_SIZE, NOTE_SIZE = 18, 15

MOVING_FRAME, MOVING_GAP, MOVING_EDGE = 192, 12, 13
"""Of the moving picture; four clips are as wide as a README."""
MOVING_HEAD, MOVING_FOOT = 34, 56
BAR_HEIGHT = 6
WEBP_QUALITY, WEBP_EFFORT = 82, 6


@dataclass(frozen=True)
class Strip:
    """A clip in a picture: its name, what it took, how near it is to the first one."""

    name: str
    clip: Clip
    seconds: float
    """Of the transformer."""
    decibel: float | None
    """PSNR against the first clip; None: this is it."""

    @property
    def notes(self) -> list[str]:
        """What is written next to the clip."""
        stats = self.clip.stats
        share = stats.num_computed / (stats.num_computed + stats.num_reused)
        notes = [f"DiT {self.seconds:.1f} s", f"{100 * share:.0f} % computed"]
        return notes if self.decibel is None else [*notes, f"{self.decibel:.1f} dB"]


def strip_of(name: str, clip: Clip, reference: Clip, *, seconds: float) -> Strip:
    """Compare a clip with the reference."""
    is_first = clip is reference
    return Strip(name, clip, seconds, None if is_first else psnr(clip.frames, reference.frames))


def draw_strips(strips: Sequence[Strip], *, title: str) -> bytes:
    """Return an opaque PNG with a row of frames per clip, from the first frame to the last."""
    width = EDGE + LABEL_WIDTH + NUM_COLUMNS * (FRAME + GAP) - GAP + EDGE
    height = TITLE_HEIGHT + len(strips) * (FRAME + GAP) - GAP + EDGE
    page = Image.new("RGB", (width, height), PAGE)
    pen = ImageDraw.Draw(page)
    name_font, note_font = ImageFont.load_default(NAME_SIZE), ImageFont.load_default(NOTE_SIZE)
    pen.text((EDGE, 13), title, fill=INK, font=name_font)
    for index, strip in enumerate(strips):
        top = TITLE_HEIGHT + index * (FRAME + GAP)
        pen.text((EDGE, top + 14), strip.name, fill=INK, font=name_font)
        for row, note in enumerate(strip.notes):
            pen.text((EDGE, top + 40 + 20 * row), note, fill=SOFT, font=note_font)
        last = len(strip.clip.frames) - 1
        for column in range(NUM_COLUMNS):
            picture = _frame(strip, round(last * column / (NUM_COLUMNS - 1)), FRAME)
            page.paste(picture, (EDGE + LABEL_WIDTH + column * (FRAME + GAP), top))
    buffer = io.BytesIO()
    page.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def draw_moving(strips: Sequence[Strip], *, title: str, fps: float) -> bytes:
    """Return an animated WebP: the clips side by side, and below each its time as a bar.

    A WebP has all colours and a tenth of a GIF's bytes.
    """
    card = _moving_card(strips, title)
    pages: list[Image.Image] = []
    for index in range(min(len(strip.clip.frames) for strip in strips)):
        page = card.copy()
        for place, strip in enumerate(strips):
            left = MOVING_EDGE + place * (MOVING_FRAME + MOVING_GAP)
            page.paste(_frame(strip, index, MOVING_FRAME), (left, MOVING_HEAD))
        pages.append(page)
    buffer = io.BytesIO()
    pages[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=pages[1:],
        duration=round(1000 / fps),
        loop=0,
        quality=WEBP_QUALITY,
        method=WEBP_EFFORT,
    )
    return buffer.getvalue()


def _moving_card(strips: Sequence[Strip], title: str) -> Image.Image:
    """Draw what does not move."""
    width = 2 * MOVING_EDGE + len(strips) * (MOVING_FRAME + MOVING_GAP) - MOVING_GAP
    height = MOVING_HEAD + MOVING_FRAME + MOVING_FOOT + MOVING_EDGE
    card = Image.new("RGB", (width, height), PAGE)
    pen = ImageDraw.Draw(card)
    name_font, note_font = ImageFont.load_default(NAME_SIZE), ImageFont.load_default(NOTE_SIZE)
    pen.text((MOVING_EDGE, 10), title, fill=SOFT, font=note_font)
    longest = max(strip.seconds for strip in strips)
    for place, strip in enumerate(strips):
        left, top = MOVING_EDGE + place * (MOVING_FRAME + MOVING_GAP), MOVING_HEAD + MOVING_FRAME
        length = max(1, round(MOVING_FRAME * strip.seconds / longest))
        pen.rectangle((left, top + 6, left + length - 1, top + 5 + BAR_HEIGHT), fill=BAR)
        pen.text((left, top + 16), strip.name, fill=INK, font=name_font)
        time, *others = strip.notes
        right = left + MOVING_FRAME
        pen.text((right, top + 18), time, fill=INK, font=note_font, anchor="ra")
        pen.text((left, top + 40), ", ".join(others), fill=SOFT, font=note_font)
    return card


def _frame(strip: Strip, index: int, size: int) -> Image.Image:
    """Return a frame as a square picture."""
    picture = Image.fromarray(strip.clip.frames[index].numpy())
    return picture.resize((size, size), Image.Resampling.BICUBIC)
