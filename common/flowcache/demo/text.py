"""The demo's text side: a tokenizer that knows the captions' words, and tiny T5 encoders.

Axes: B batch, L tokens, D text width.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from flowcache.demo.clips import all_attributes, caption_of

PAD, END = "<pad>", "</s>"
TEXT_LEN = 24
TEXT_WIDTH = 64


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per caption word and an end token.

    Every other word, of any language, is dropped, so that a prompt may be anything.
    Example: "A red Circle, 红色!" becomes the tokens of "a red circle" and the end token.
    """
    words = sorted({word for entry in all_attributes() for word in caption_of([entry] * 2).split()})
    vocabulary = {word: index for index, word in enumerate([PAD, END, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    # Keep the known words and remove all between them: the model never meets an unknown one.
    known = Regex(r"\b(?:" + "|".join(words) + r")\b")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(known, behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=TEXT_LEN
    )


_ENCODER: dict[str, Any] = {
    "d_model": TEXT_WIDTH,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "eos_token_id": 1,
}
"""Sizes of the untrained text encoders: two layers of width 64."""


def new_umt5_encoder() -> UMT5EncoderModel:
    """Make an untrained UMT5 encoder."""
    return UMT5EncoderModel(UMT5Config(vocab_size=len(build_tokenizer()), **_ENCODER))


def new_t5_encoder() -> T5EncoderModel:
    """Make an untrained T5 encoder."""
    return T5EncoderModel(T5Config(vocab_size=len(build_tokenizer()), **_ENCODER))


@torch.no_grad()
def start_encoder(
    encoder: UMT5EncoderModel | T5EncoderModel, *, folder: Path, tokenizer: Path
) -> None:
    """Give an encoder trained weights, in place; words that were not known then stay untrained.

    Args:
        folder: of the trained encoder.
        tokenizer: file of its tokenizer.
    """
    trained = type(encoder).from_pretrained(folder, dtype=torch.float32)
    weights, rows = trained.state_dict(), encoder.get_input_embeddings().weight.clone()
    known = Tokenizer.from_file(str(tokenizer)).get_vocab()
    for word, index in build_tokenizer().get_vocab().items():
        if word in known:
            rows[index] = weights["shared.weight"][known[word]]
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if name in weights:
            weights[name] = rows
    encoder.load_state_dict(weights)


def encode_captions(
    encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]
) -> Tensor:
    """Encode captions to `[B, L, D]`; the rows of padding are zero, as at sampling time."""
    tokens = tokenizer(
        captions, padding="max_length", max_length=TEXT_LEN, truncation=True, return_tensors="pt"
    )
    states_BLD = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states_BLD * tokens.attention_mask[..., None]
