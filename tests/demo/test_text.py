"""The demo's tokenizer keeps the captions' words and drops all others."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flowcache.demo.clips import all_attributes
from flowcache.demo.text import (
    TEXT_LEN,
    TEXT_WIDTH,
    build_tokenizer,
    encode_captions,
    new_umt5_encoder,
)


@pytest.fixture
def tokenizer(tmp_path: Path):
    build_tokenizer().save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_every_caption_has_its_own_tokens_and_an_end(tokenizer: PreTrainedTokenizerBase):
    rows = [tuple(tokenizer(entry.caption).input_ids) for entry in all_attributes()]
    assert len(set(rows)) == 120
    assert all(len(row) == 10 and row[-1] == tokenizer.eos_token_id for row in rows)
    assert tokenizer.model_max_length == TEXT_LEN


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        ("A RED circle, moving!", "a red circle moving"),
        ("reddish arena 红色 圆 красный", ""),
        ("一 red 红 circle", "red circle"),
        ("", ""),
    ],
)
def test_unknown_words_of_any_language_are_dropped(
    tokenizer: PreTrainedTokenizerBase, prompt: str, kept: str
):
    assert tokenizer(prompt).input_ids == tokenizer(kept).input_ids
    assert tokenizer(kept).input_ids[-1] == tokenizer.eos_token_id


def test_a_prompt_of_any_length_fits(tokenizer: PreTrainedTokenizerBase):
    ids = tokenizer("red " * 25_000, padding="max_length", truncation=True).input_ids
    assert len(ids) == TEXT_LEN
    assert ids[-1] == tokenizer.eos_token_id


def test_padding_rows_are_zero():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = new_umt5_encoder().eval()
    states = encode_captions(encoder, tokenizer, ["a red circle", ""])
    assert states.shape == (2, TEXT_LEN, TEXT_WIDTH)
    assert (states[0, 4:] == 0).all()
    assert (states[1, 1:] == 0).all()
    assert (states[0, :4].abs().sum(-1) > 0).all()
