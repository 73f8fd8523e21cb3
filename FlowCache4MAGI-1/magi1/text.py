"""The prompt through T5 v1.1, in float32.

Axes: L prompt tokens, C width of the encoder.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime import profile
from flowcache.runtime.embeddings import hash_files
from flowcache.runtime.tokenizer import load_tokenizer, tokenizer_files
from flowcache.runtime.weights import (
    check_files,
    find_shards,
    load_files,
    match,
    read,
    read_model_config,
)
from magi1.prompt import clean

# Seconds to import: where nothing is encoded, as for --help, they are never loaded.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

logger = logging.getLogger(__name__)

T5_FOLDER = "t5-v1_1-xxl"
"""Folder of the encoder below the `t5_pretrained` folder of a config."""

_DECODER = ("decoder.", "lm_head.")


class TextEncoder:
    """T5 with its tokenizer: a prompt to what the transformer attends to."""

    def __init__(
        self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int
    ) -> None:
        # Any: transformers types its methods as untyped wrappers
        self.model: Any = model
        self._tokenizer = tokenizer
        self._max_length = max_length

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; returns the encoder itself."""
        self.model.to(device)
        return self

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt, cleaned, with the end token; more than fit are cut."""
        return len(self._tokenizer(clean(prompt), verbose=False).input_ids)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt to its own tokens, without padding: `[L, C]` float32.

        A prompt that is too long is cut, with a warning that says by how much.
        """
        num_cut = self.count_tokens(prompt) - self._max_length
        if num_cut > 0:
            logger.warning(
                "the prompt is %d tokens too long, its end is cut off (at most %d): %.40s...",
                num_cut,
                self._max_length,
                prompt,
            )
        tokens = self._tokenizer(
            clean(prompt), max_length=self._max_length, truncation=True, return_tensors="pt"
        )
        return self.model(input_ids=tokens.input_ids.to(self.model.device)).last_hidden_state[0]


def _build(folder: Path) -> T5EncoderModel:
    """Build an empty encoder."""
    from transformers import T5Config, T5EncoderModel

    path = folder / "config.json"
    values = read_model_config(path)
    try:
        config = T5Config(**values)
        with torch.device("meta"):
            return T5EncoderModel(config)
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        ZeroDivisionError,
        StrictDataclassError,
    ) as error:
        raise UserError(f"{path}: makes no T5 encoder ({_reason(error)})") from error


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


def fingerprint(folder: str | Path) -> str:
    """Return a hash of the encoder and its tokenizer; little of the weights is read."""
    folder = Path(folder)
    weights = match(_build(folder), read(find_shards(folder)), ignored=_is_decoder)
    sizes = {"tokenizer": hash_files(tokenizer_files(folder))}
    return profile.fingerprint(sizes, ((names[0], tensor) for names, tensor in weights))


def empty(folder: str | Path) -> T5EncoderModel:
    """Build an empty encoder of the size of a folder.

    Raises:
        UserError: the config is missing or makes no encoder.
    """
    return _build(Path(folder))


def _is_decoder(key: str) -> bool:
    """Whether a key belongs to the half of a whole T5 that is not needed."""
    return key.startswith(_DECODER)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check(folder: str | Path, *, width: int) -> None:
    """Check that the encoder's files are there, whole, and fit, and that its tokenizer loads.

    Args:
        width: caption channels of the transformer.

    Raises:
        UserError: naming the file and the key.
    """
    folder = Path(folder)
    model = _build(folder)
    if model.config.d_model != width:
        raise UserError(f"{folder}: width is {model.config.d_model}, the transformer takes {width}")
    check_files(model, find_shards(folder), ignored=_is_decoder)
    load_tokenizer(folder, vocab_size=model.config.vocab_size)


def count_tokens(folder: str | Path, prompt: str, *, max_length: int) -> int:
    """Count the tokens that a prompt will have, without the encoder's weights.

    Raises:
        UserError: the folder holds no tokenizer.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(folder, vocab_size=_build(folder).config.vocab_size)
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

    Raises:
        UserError: naming the file and the key, if the files do not fit.
    """
    folder = Path(folder)
    model = _build(folder)
    tokenizer = load_tokenizer(folder, vocab_size=model.config.vocab_size)
    load_files(model, find_shards(folder), ignored=_is_decoder, dtype=dtype, device=device)
    return TextEncoder(model, tokenizer, max_length=max_length)
