"""Load the tokenizer of a text encoder from its folder, as the released checkpoints hold it.

The folder holds `tokenizer.json`, or only `spiece.model` (SentencePiece), from which transformers
builds the same tokenizer.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from flowcache.errors import UserError, one_line
from flowcache.runtime.files import read_json

# Seconds to import: where nothing is encoded, as for --help, it is never loaded.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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
    """Load a tokenizer from a local folder.

    Args:
        vocab_size: words that the encoder knows.
        needs_padding: whether prompts are padded.
    """
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
