"""What each chunk is conditioned on: the prompt, cleaned, through T5 v1.1, after special tokens.

A learned token says how many chunks come after the chunk, others ask for quality or style. They
come from a file that is published apart from the weights, and may be left out.

Axes: L text tokens, C caption channels, the width of the encoder.
"""

from __future__ import annotations

import html
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from flowcache.errors import UserError, first_line
from flowcache.runtime import profile
from flowcache.runtime.embeddings import hash_files, load_tokenizer, tokenizer_files, warn_if_cut
from flowcache.runtime.files import ARRAY_ERRORS
from flowcache.runtime.weights import (
    check_files,
    find_shards,
    load_files,
    match,
    read,
    read_model_config,
)
from magi1.config import TokenChoice
from magi1.markup import markup_text

# Seconds to import: where nothing is encoded, as for --help, they are never loaded.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

T5_FOLDER = "t5-v1_1-xxl"
"""Folder of the encoder below the `t5_pretrained` folder of a config."""
NULL_TOKENS = 50
"""Tokens of the learned null caption; the rest of it is never attended to."""
NUM_OTHER = 100
MAX_REMAINING = 8
"""Counts of remaining chunks that have a token of their own."""
MAX_JOINTS = 3
"""With more dashes and underscores than this in all, they are taken for blanks."""

_DECODER = ("decoder.", "lm_head.")
"""Keys of the half of a whole T5 that is not needed."""
_CONFIG_ERRORS = (
    *(OSError, ValueError, TypeError, RuntimeError, ArithmeticError),
    StrictDataclassError,
)
"""What transformers raises for sizes that make no encoder."""
_STYLE_ROWS = {
    "static": 2,
    "dynamic": 3,
    "borderness": 4,
    "quality": 1,
    "three_d_model": 15,
    "two_d_anime": 16,
}
"""Rows of the tokens of `TokenChoice`."""
_TRANSITION_ROW, _BORDER_ROW = 0, 4
_FIRST_DURATION = 7
"""Row of the token of the last chunk; the next ones are of chunks with more to come."""


# The encoder --------------------------------------------------------------------------------------


class TextEncoder:
    """T5 with its tokenizer."""

    def __init__(
        self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int
    ) -> None:
        # Any: transformers types its methods as untyped wrappers
        self.model: Any = model
        self._tokenizer = tokenizer
        self._max_length = max_length

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt, cleaned, with the end token; more than fit are cut."""
        return len(self._tokenizer(clean(prompt), verbose=False).input_ids)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt to its own tokens, without padding: `[L, C]` float32.

        A prompt that is too long is cut, with a warning that says by how much.
        """
        warn_if_cut(prompt, self.count_tokens(prompt), most=self._max_length)
        tokens = self._tokenizer(
            clean(prompt), max_length=self._max_length, truncation=True, return_tensors="pt"
        )
        return self.model(input_ids=tokens.input_ids.to(self.model.device)).last_hidden_state[0]


def empty(folder: str | Path) -> T5EncoderModel:
    """Build an empty encoder of the size of a folder."""
    from transformers import T5Config, T5EncoderModel

    path = Path(folder) / "config.json"
    values = read_model_config(path)
    try:
        config = T5Config(**values)
        with torch.device("meta"):
            return T5EncoderModel(config)
    except _CONFIG_ERRORS as error:
        raise UserError(f"{path}: makes no T5 encoder ({first_line(error)})") from error


def released() -> T5EncoderModel:
    """Build an empty encoder of the released size (T5 v1.1 XXL)."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        return T5EncoderModel(config)


def hash_encoder(folder: str | Path) -> str:
    """Return a hash of the encoder and its tokenizer; little of the weights is read."""
    folder = Path(folder)
    weights = match(empty(folder), read(find_shards(folder)), ignored=_is_decoder)
    sizes = {"tokenizer": hash_files(tokenizer_files(folder))}
    return profile.fingerprint(sizes, ((names[0], tensor) for names, tensor in weights))


def _is_decoder(key: str) -> bool:
    return key.startswith(_DECODER)


def check_encoder(folder: str | Path, *, width: int) -> None:
    """Check that the encoder's files are there, whole, and fit, and that its tokenizer loads.

    Args:
        width: caption channels of the transformer.
    """
    folder = Path(folder)
    model = empty(folder)
    if model.config.d_model != width:
        raise UserError(f"{folder}: width is {model.config.d_model}, the transformer takes {width}")
    check_files(model, find_shards(folder), ignored=_is_decoder)
    load_tokenizer(folder, vocab_size=model.config.vocab_size)


def count_tokens(folder: str | Path, prompt: str, *, max_length: int) -> int:
    """Count the tokens that a prompt will have, without the encoder's weights."""
    folder = Path(folder)
    tokenizer = load_tokenizer(folder, vocab_size=empty(folder).config.vocab_size)
    return min(len(tokenizer(clean(prompt), verbose=False).input_ids), max_length)


def load(
    folder: str | Path,
    *,
    max_length: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """Load the encoder with its tokenizer.

    Args:
        max_length: tokens that the transformer takes.
        dtype: type of all weights; the released models use float32.
    """
    folder = Path(folder)
    model = empty(folder)
    tokenizer = load_tokenizer(folder, vocab_size=model.config.vocab_size)
    load_files(model, find_shards(folder), ignored=_is_decoder, dtype=dtype, device=device)
    return TextEncoder(model, tokenizer, max_length=max_length)


# Cleaning a prompt as MAGI-1's training captions were cleaned -------------------------------------

# Source of the rules: the caption cleaning of DeepFloyd IF, which the released models use; each
# rule is stated here in our own form and order matters. Chinese characters are removed by it.

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_JOINT = re.compile(r"[-_]")


Rules: TypeAlias = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def _link(scheme: str) -> str:
    """Match a scheme, or a bare host name with its path (but no mail address)."""
    host = rf"[a-zA-Z0-9.\-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@)"
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{host})"


_LINKS = _rules(("<person>", "person"), (_link("https?"), ""), (_link("www"), ""))

_CHARACTERS = _rules(
    (r"@\w+\b", ""),  # nicknames
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes, enclosed and compatibility letters, ideographs
    # every dash of Unicode
    (
        r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
        r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # an article's time
    (r"\\n", " "),  # a line break that was written out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)

_SPAM = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # catalogue numbers: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)

_HUGE = re.compile(r"(?<=&#)[0-9]{8,}")
"""Numbers of character references that are beyond Unicode."""

_EDGES = _rules(
    (r"(?s)^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean(prompt: str) -> str:
    """Return the prompt as the text encoder is to see it: cleaned twice, as in training.

    Example: `"snow_falling-on-cedar-trees_at-night"` becomes
    `"snow falling on cedar trees at night"`.
    """
    return clean_once(clean_once(prompt))


def clean_once(prompt: str) -> str:
    """Apply all rules once: links, markup, odd characters, mojibake, spam, edges."""
    import ftfy

    text = urllib.parse.unquote_plus(prompt).strip().lower()
    text = _apply(_LINKS, text)
    text = _apply(_CHARACTERS, markup_text(text))
    if len(_JOINT.findall(text)) > MAX_JOINTS:
        text = _JOINT.sub(" ", text)
    text = _unescape(_unescape(ftfy.fix_text(text))).strip()
    return _apply(_EDGES, _apply(_SPAM, text)).strip()


def _unescape(text: str) -> str:
    """Resolve character references; Python refuses to read numbers of thousands of digits."""
    return html.unescape(_HUGE.sub("99999999", text))


def _apply(rules: Iterable[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


# Special tokens before it -------------------------------------------------------------------------

NO_TOKENS = TokenChoice(quality=False, duration=False)


@dataclass(frozen=True)
class SpecialTokens:
    """The learned tokens, `[1, C]`, `[1, C]` and `[100, C]`, rounded to float16 as released."""

    caption: Tensor
    logo: Tensor
    other: Tensor

    def chosen(self, choice: TokenChoice) -> list[Tensor]:
        """Return the tokens of a choice, that of duration left out, `[1, C]` float32 each."""
        return [self._row(_STYLE_ROWS[name]) for name in choice.names()]

    def duration(self, remaining: int) -> Tensor:
        """Return the token of a chunk with `remaining` chunks after it, `[1, C]` float32."""
        return self._row(_FIRST_DURATION + min(remaining, MAX_REMAINING - 1))

    def negative(self) -> list[Tensor]:
        """Return the tokens of what is unwanted: captions, logos, transitions and borders."""
        written = [token.half().float() for token in (self.caption, self.logo)]
        return [*written, self._row(_TRANSITION_ROW), self._row(_BORDER_ROW)]

    def _row(self, row: int) -> Tensor:
        return self.other[row].unsqueeze(0).half().float()


def load_special_tokens(path: str | Path, *, channels: int) -> SpecialTokens:
    """Read the special tokens from their `.npz` file.

    Args:
        channels: caption channels of the transformer.
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
        reason = first_line(error)
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


def _prepended(tokens: Sequence[Tensor], text_LC: Tensor, *, max_length: int) -> Tensor:
    """Put tokens before a text one after the other, so that the last one comes first."""
    front = [token.to(text_LC.device) for token in reversed(tokens)]
    return torch.cat([*front, text_LC])[:max_length]


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
        max_length: longest text of a chunk; what no longer fits is cut off at the end.
    """
    text = text_LC.float()
    if tokens is None:
        return [text[:max_length]] * num_chunks
    fronts = [
        tokens.chosen(choice) + [tokens.duration(num_chunks - chunk - 1)] * choice.duration
        for chunk in range(num_chunks)
    ]
    return [_prepended(front, text, max_length=max_length) for front in fronts]


def null_caption(
    learned_LC: Tensor, *, tokens: SpecialTokens | None = None, choice: TokenChoice = NO_TOKENS
) -> Tensor:
    """Return the text without content, `[50, C]` float32 (fewer if the model has fewer).

    Args:
        learned_LC: the model's learned caption.
        tokens: read only where the choice asks for negative tokens.
    """
    null = learned_LC.float()
    if choice.negative and tokens is not None:
        null = _prepended(tokens.negative(), null, max_length=len(null))
    return null[:NULL_TOKENS]
