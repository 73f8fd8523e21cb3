"""What each chunk is told: special tokens, then the prompt.

A learned token tells how many chunks come after the chunk, others ask for quality or style. They
come from a file that is published apart from the weights, and may be left out.

Axes: L text tokens, C caption channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.files import ARRAY_ERRORS

NULL_TOKENS = 50
"""Tokens of the learned caption that stand for no text; the rest of it is never attended to."""
NUM_OTHER = 100
MAX_REMAINING = 8
"""Counts of remaining chunks that have a token of their own."""

_ROWS = {
    "TRANS": 0,
    "HQ": 1,
    "STATIC_FIRST_FRAMES": 2,
    "DYNAMIC_FIRST_FRAMES": 3,
    "BORDERNESS": 4,
    "THREE_D_MODEL": 15,
    "TWO_D_ANIME": 16,
}
_FIRST_DURATION = 7
"""Row of the token of the last chunk; the next ones are of chunks with more to come."""
_NEGATIVE = ("CAPTION", "LOGO", "TRANS", "BORDERNESS")


@dataclass(frozen=True)
class TokenChoice:
    """Which special tokens go before the prompt.

    Attributes:
        static: the video starts with a still picture.
        dynamic: the video starts with motion.
        borderness: the picture has borders.
        quality: the video is of high quality.
        three_d_model: a look of computer graphics.
        two_d_anime: a look of drawn animation.
        duration: how many chunks come after this one.
        negative: tokens of captions, logos, transitions and borders before the text that stands
            for no text.
    """

    static: bool = False
    dynamic: bool = False
    borderness: bool = False
    quality: bool = True
    three_d_model: bool = False
    two_d_anime: bool = False
    duration: bool = True
    negative: bool = False

    def names(self) -> list[str]:
        """Return the chosen tokens but that of duration, in the order they are put in front."""
        chosen = {
            "STATIC_FIRST_FRAMES": self.static,
            "DYNAMIC_FIRST_FRAMES": self.dynamic,
            "BORDERNESS": self.borderness,
            "HQ": self.quality,
            "THREE_D_MODEL": self.three_d_model,
            "TWO_D_ANIME": self.two_d_anime,
        }
        return [name for name, is_chosen in chosen.items() if is_chosen]


NO_TOKENS = TokenChoice(quality=False, duration=False)


@dataclass(frozen=True)
class SpecialTokens:
    """The learned tokens, `[1, C]`, `[1, C]` and `[100, C]`, rounded to float16 as released."""

    caption: Tensor
    logo: Tensor
    other: Tensor

    def token(self, name: str) -> Tensor:
        """Return a token by its name, `[1, C]` float32."""
        if name in ("CAPTION", "LOGO"):
            token = self.caption if name == "CAPTION" else self.logo
        else:
            token = self.other[_ROWS[name]].unsqueeze(0)
        return token.half().float()

    def duration(self, remaining: int) -> Tensor:
        """Return the token of a chunk with `remaining` chunks after it, `[1, C]` float32."""
        row = _FIRST_DURATION + min(remaining, MAX_REMAINING - 1)
        return self.other[row].unsqueeze(0).half().float()


def load_special_tokens(path: str | Path, *, channels: int) -> SpecialTokens:
    """Read the special tokens from their `.npz` file.

    Args:
        channels: caption channels of the transformer.

    Raises:
        UserError: the file is missing, not readable, or an array is missing or of another shape.
    """
    shapes = {
        "caption_token": (1, channels),
        "logo_token": (1, channels),
        "other_tokens": (NUM_OTHER, channels),
    }
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; special tokens come as special_tokens.npz")
    arrays: dict[str, Tensor] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in shapes:
                if name not in file:
                    raise UserError(f"{path}: has no array {name}; not a special-token file")
                array = np.asarray(file[name])
                if array.dtype.kind not in "fiu":
                    raise UserError(f"{path}: {name} holds {array.dtype}, expected real numbers")
                arrays[name] = torch.from_numpy(array.astype(np.float32))
    except UserError:
        raise
    except ARRAY_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable npz file ({reason}); download it again") from error
    for name, shape in shapes.items():
        found = tuple(arrays[name].shape)
        if found != shape:
            raise UserError(f"{path}: {name} has shape {list(found)}, expected {list(shape)}")
        if not arrays[name].half().isfinite().all():
            raise UserError(
                f"{path}: {name} holds numbers that are not finite in float16; download it again"
            )
    return SpecialTokens(*(arrays[name] for name in shapes))


def prepend(tokens: Sequence[Tensor], text_LC: Tensor, *, max_length: int) -> Tensor:
    """Put tokens before a text one after the other, so that the last one comes first.

    What no longer fits is cut off at the end.
    """
    return torch.cat([*reversed(tokens), text_LC])[:max_length]


def chunk_captions(
    text_LC: Tensor,
    *,
    num_chunks: int,
    tokens: SpecialTokens | None,
    choice: TokenChoice,
    max_length: int,
) -> list[Tensor]:
    """Return the text of every chunk to denoise, special tokens first, each `[L', C]` float32.

    Args:
        text_LC: the encoded prompt.
        tokens: None: no special tokens.
        max_length: longest text that a chunk is told.
    """
    text = text_LC.float()
    if tokens is None:
        return [text[:max_length]] * num_chunks
    style = [tokens.token(name).to(text.device) for name in choice.names()]
    captions: list[Tensor] = []
    for chunk in range(num_chunks):
        front = list(style)
        if choice.duration:
            front.append(tokens.duration(num_chunks - chunk - 1).to(text.device))
        captions.append(prepend(front, text, max_length=max_length))
    return captions


def null_caption(
    learned_LC: Tensor, *, tokens: SpecialTokens | None = None, choice: TokenChoice = NO_TOKENS
) -> Tensor:
    """Return the text that stands for no text, `[50, C]` float32 (fewer if the model has fewer).

    Args:
        learned_LC: the model's learned caption.
        tokens: read only where the choice asks for negative tokens.
    """
    null = learned_LC.float()
    if choice.negative and tokens is not None:
        front = [tokens.token(name).to(null.device) for name in _NEGATIVE]
        null = prepend(front, null, max_length=len(null))
    return null[:NULL_TOKENS]
