"""The prompt through T5 v1.1, in float32.

Axes: L prompt tokens, C width of the encoder.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from flowcache.embeddings import hash_files
from flowcache.errors import UserError
from flowcache.tune import profile
from flowcache.weights import check_files, find_shards, load_files, match, read
from magi1.prompt import clean

# Seconds to import: where nothing is encoded, as for --help, they are never loaded.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

logger = logging.getLogger(__name__)

T5_FOLDER = "t5-v1_1-xxl"
"""Folder of the encoder below the `t5_pretrained` folder of a config."""

_INDEX = "pytorch_model.bin.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
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


def find_files(folder: str | Path) -> tuple[Path, ...]:
    """List the weight files of an encoder: safetensors, or else the `.bin` files of the release.

    Raises:
        UserError: a file is missing.
    """
    folder = Path(folder)
    if any(folder.glob("*.safetensors")) or not folder.is_dir():
        return find_shards(folder)
    index = folder / _INDEX
    if not index.is_file():
        paths = (folder / "pytorch_model.bin",)
    else:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = tuple(folder / name for name in sorted(set(weight_map.values())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not a readable index; download it again") from error
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; the encoder is not complete, download it again")
    return paths


def _build(folder: Path) -> T5EncoderModel:
    """Build an empty encoder."""
    from transformers import T5Config, T5EncoderModel

    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; the encoder is not complete, download it again")
    try:
        config = T5Config.from_json_file(path)
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
    weights = match(_build(folder), read(find_files(folder)), ignored=_is_decoder)
    kept = [path for name in _TOKENIZER_FILES if (path := folder / name).is_file()]
    kept += folder.glob("*token*config.json")
    sizes = {"tokenizer": hash_files(kept)}
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


def _load_tokenizer(folder: Path, *, vocab_size: int) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    # without either, transformers makes up a tokenizer that knows no words
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{folder}: holds no tokenizer ({' or '.join(_TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"{folder}: no readable tokenizer ({_reason(error)})") from error
    if len(tokenizer) > vocab_size:
        rule = f"the text encoder knows {vocab_size}"
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, {rule}")
    return tokenizer


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
    check_files(model, find_files(folder), ignored=_is_decoder)
    _load_tokenizer(folder, vocab_size=model.config.vocab_size)


def count_tokens(folder: str | Path, prompt: str, *, max_length: int) -> int:
    """Count the tokens that a prompt will have, without the encoder's weights.

    Raises:
        UserError: the folder holds no tokenizer.
    """
    folder = Path(folder)
    tokenizer = _load_tokenizer(folder, vocab_size=_build(folder).config.vocab_size)
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
    tokenizer = _load_tokenizer(folder, vocab_size=model.config.vocab_size)
    load_files(model, find_files(folder), ignored=_is_decoder, dtype=dtype, device=device)
    return TextEncoder(model, tokenizer, max_length=max_length)
