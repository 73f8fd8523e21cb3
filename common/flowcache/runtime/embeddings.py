"""Encoded prompts kept on disk, so that the text encoder need not be loaded for known ones.

A file is named by a hash of all that the result depends on: prompts, text encoder, tokenizer,
settings. Its own content tells whether it is whole.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowcache.bounds import given_path
from flowcache.errors import UserError
from flowcache.runtime.files import check_writable

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


def cached_embedding(
    folder: str | None, facts: Callable[[], Mapping[str, Any]], encode: Callable[[], Tensor]
) -> Tensor:
    """Return what `encode` gives, from the folder if it was kept there; on the CPU in that case.

    Args:
        folder: None: nothing is kept.
        facts: all that the result depends on, as plain values for JSON; not asked for without a
            folder.
        encode: makes the embedding; not called if it is known.

    Raises:
        UserError: the folder can't be written.
    """
    if folder is None:
        return encode()
    key, home = _key(facts()), given_path(folder, name=SETTING)
    path = home / f"{key}.safetensors"
    known = _read(path, key=key)
    if known is not None:
        logger.info("text          known: read from %s", path)
        return known
    check_writable(home)
    made = encode()
    _write(path, made, key=key)
    return made


def check_cache(folder: str | None) -> None:
    """Check that embeddings can be kept in a folder, which is made.

    A folder that is there may be read-only: the prompts may all be known.

    Raises:
        UserError: it is no folder, or can't be made.
    """
    if folder is None:
        return
    home = given_path(folder, name=SETTING)
    if not home.is_dir():
        check_writable(home)


def _key(facts: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _read(path: Path, *, key: str) -> Tensor | None:
    """Read a kept embedding, None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            told: Mapping[str, str] = file.metadata() or {}
            tensor = file.get_tensor(_NAME)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
    else:
        reason = "its content is not what was written"
        if told.get("key") == key and told.get("sha256") == _digest(tensor):
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
