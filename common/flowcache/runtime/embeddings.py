"""Prompts: their tokenizer, as released checkpoints hold it, and embeddings kept on the disk.

A tokenizer's folder holds `tokenizer.json`, or only `spiece.model` (SentencePiece), from which
transformers builds the same tokenizer. A kept embedding is named by a hash of all that it depends
on (prompts, encoder, tokenizer, settings), and its own content shows whether it is whole; the text
encoder need not be loaded for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowcache.bounds import given_path
from flowcache.errors import UserError, first_line, one_line
from flowcache.runtime.files import check_writable, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # takes seconds to import

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the files and of what is hashed."""
SETTING = "embedding_cache"
_NAME = "embedding"


def hash_files(paths: Iterable[Path]) -> str:
    """Return a hash of the names and the content of small files."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def cached_embedding(folder: str, facts: Mapping[str, Any], encode: Callable[[], Tensor]) -> Tensor:
    """Return what `encode` gives, from the folder if it was kept there; on the CPU in that case."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=False)
    key, home = hashlib.sha256(text.encode()).hexdigest(), given_path(folder, name=SETTING)
    path = home / f"{key}.safetensors"
    known = _read(path, key=key)
    if known is not None:
        logger.info("text          known: read from %s", path)
        return known
    check_writable(home)
    made = encode()
    _write(path, made, key=key)
    return made


def check_cache(folder: str) -> None:
    """Check that embeddings can be kept in a folder, which is made."""
    home = given_path(folder, name=SETTING)
    if not home.is_dir():
        check_writable(home)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _read(path: Path, *, key: str) -> Tensor | None:
    """Read a kept embedding, None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensor = file.get_tensor(_NAME)
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
    else:
        reason = "its content is not what was written"
        if metadata.get("key") == key and metadata.get("sha256") == _digest(tensor):
            if bool(tensor.isfinite().all()):
                return tensor
            reason = "it holds values that are not finite"
    logger.warning("%s is damaged (%s): the prompt is encoded again", path, reason)
    return None


def _write(path: Path, tensor: Tensor, *, key: str) -> None:
    """Keep an embedding; a reader sees nothing or the whole file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    stored = tensor.detach().cpu().contiguous()
    try:
        save_file({_NAME: stored}, part, metadata={"key": key, "sha256": _digest(stored)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path}: cannot be written ({error}); is the disk full?") from None


# Tokenizers ---------------------------------------------------------------------------------------

VOCABULARIES = ("tokenizer.json", "spiece.model")
"""Files of which a tokenizer needs one: else transformers makes up one that knows no words."""


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files of a tokenizer's folder that its words depend on, in order."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{folder}: holds no tokenizer ({' or '.join(VOCABULARIES)})")
    # config.json is of the encoder, where both share a folder
    kept = [path for path in folder.glob("*token*.json") if not path.name.startswith(".")]
    kept += [path for name in VOCABULARIES[1:] if (path := folder / name).is_file()]
    return sorted(kept)


def load_tokenizer(
    folder: Path, *, vocab_size: int, needs_padding: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder."""
    from transformers import AutoTokenizer

    for path in tokenizer_files(folder):
        if path.suffix == ".json":  # the libraries' own readers crash or raise anything
            read_json(path, advice="download it again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = one_line(error) or type(error).__name__
        raise UserError(f"{folder}: no readable tokenizer ({reason})") from error
    # of an empty file transformers makes a tokenizer that knows special tokens only
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise UserError(f"{folder}: the tokenizer knows no words; download it again")
    if needs_padding and tokenizer.pad_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no padding token; prompts need one")
    if len(tokenizer) > vocab_size:
        rule = f"the text encoder knows {vocab_size}"
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, {rule}")
    return tokenizer


def warn_if_cut(prompt: str, num_tokens: int, *, most: int) -> None:
    """Warn that the end of a prompt of more than `most` tokens is cut off, and by how much."""
    if num_tokens > most:
        logger.warning(
            "the prompt is %d tokens too long, its end is cut off (at most %d): %.40s...",
            num_tokens - most,
            most,
            prompt,
        )
