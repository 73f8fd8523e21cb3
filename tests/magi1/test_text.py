"""T5 from a folder, special tokens before the prompt, and files that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from flowcache.errors import UserError
from magi1.config import TokenChoice
from magi1.text import (
    NO_TOKENS,
    SpecialTokens,
    check_encoder,
    chunk_captions,
    load,
    load_special_tokens,
    null_caption,
)

pytestmark = pytest.mark.numeric

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "sits", "on", "grass"]
CONFIG = T5Config(
    vocab_size=16,
    d_model=12,
    d_kv=4,
    d_ff=16,
    num_layers=2,
    num_heads=3,
    feed_forward_proj="gated-gelu",
)


def tiny_model() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(CONFIG).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An encoder in the layout of transformers, with a tokenizer of eight words."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def as_released(folder: Path) -> Path:
    """Store the weights as the release does: two pickled shards and an index."""
    (folder / "model.safetensors").unlink()
    state = tiny_model().state_dict()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    weight_map = {key: names[place % 2] for place, key in enumerate(state)}
    for name in names:
        torch.save({k: state[k].clone() for k in state if weight_map[k] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_prompt_is_encoded_to_its_own_tokens(folder: Path):
    check_encoder(folder, width=12)
    encoder = load(folder, max_length=800, device="cpu")
    text = encoder.encode("  A CAT   sits on grass ")
    ids = torch.tensor([[3, 4, 5, 6, 7, 1]])
    with torch.no_grad():
        want = tiny_model()(input_ids=ids).last_hidden_state[0]
    assert_close(text, want, ulps=256)
    assert encoder.count_tokens("a cat") == 3


def test_padding_changes_nothing(folder: Path):
    text = load(folder, max_length=800, device="cpu").encode("a cat")
    ids, mask = torch.tensor([[3, 4, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        padded = tiny_model()(input_ids=ids, attention_mask=mask).last_hidden_state[0]
    assert_close(text, padded[:3], ulps=256)


def test_a_long_prompt_is_cut_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture):
    encoder = load(folder, max_length=4, device="cpu")
    assert encoder.encode("a cat sits on grass").shape == (4, 12)
    assert "2 tokens too long" in caplog.text


def test_the_released_shards_are_loaded(folder: Path):
    want = load(folder, max_length=8, device="cpu").encode("a cat")
    as_released(folder)
    check_encoder(folder, width=12)
    assert torch.equal(load(folder, max_length=8, device="cpu").encode("a cat"), want)


def _without_shard(folder: Path) -> None:
    as_released(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "width", "message"),
    [
        (_without_shard, 12, r"pytorch_model-00002-of-00002\.bin: no such file"),
        (lambda _: None, 4096, "width is 12, the transformer takes 4096"),
        (lambda folder: (folder / "tokenizer.json").unlink(), 12, "holds no tokenizer"),
    ],
    ids=["a missing shard", "another width", "no tokenizer"],
)
def test_an_encoder_that_does_not_fit_is_refused(
    folder: Path, damage: Callable[[Path], None], width: int, message: str
):
    damage(folder)
    with pytest.raises(UserError, match=message):
        check_encoder(folder, width=width)


# Special tokens before the prompt -----------------------------------------------------------

CHANNELS = 2
TEXT = torch.full((3, CHANNELS), 0.5)


@pytest.fixture
def tokens() -> SpecialTokens:
    """Tokens whose values tell which they are: the row number; captions 1000, logos 2000."""
    rows = torch.arange(100.0).unsqueeze(1).expand(-1, CHANNELS)
    return SpecialTokens(torch.full((1, CHANNELS), 1000.0), torch.full((1, CHANNELS), 2000.0), rows)


def first_channel(texts: list[Tensor]) -> list[list[float]]:
    return [text[:, 0].tolist() for text in texts]


def captions(tokens: SpecialTokens | None, choice: TokenChoice, *, num: int) -> list[list[float]]:
    return first_channel(
        chunk_captions(TEXT, num_chunks=num, tokens=tokens, choice=choice, max_length=6)
    )


def test_a_chunk_is_told_how_many_come_after_it_and_to_be_good(tokens: SpecialTokens):
    # row 7 is the last chunk, 8 the one before it; row 1 asks for quality
    assert captions(tokens, TokenChoice(), num=3) == [
        [9.0, 1.0, 0.5, 0.5, 0.5],
        [8.0, 1.0, 0.5, 0.5, 0.5],
        [7.0, 1.0, 0.5, 0.5, 0.5],
    ]


def test_counts_above_seven_share_a_token(tokens: SpecialTokens):
    choice = TokenChoice(quality=False)
    firsts = [each[0] for each in captions(tokens, choice, num=10)]
    assert firsts == [14.0, 14.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0]


def test_all_tokens_come_in_reverse_and_push_the_text_out(tokens: SpecialTokens):
    choice = TokenChoice(
        static=True, dynamic=True, borderness=True, three_d_model=True, two_d_anime=True
    )
    assert captions(tokens, choice, num=1) == [[7.0, 16.0, 15.0, 1.0, 4.0, 3.0]]


def test_without_tokens_every_chunk_gets_the_prompt(tokens: SpecialTokens):
    assert captions(None, TokenChoice(), num=2) == [[0.5, 0.5, 0.5]] * 2
    assert captions(tokens, NO_TOKENS, num=2) == [[0.5, 0.5, 0.5]] * 2


def test_no_text_is_the_start_of_the_learned_caption(tokens: SpecialTokens):
    learned = torch.arange(60.0).unsqueeze(1)
    assert torch.equal(null_caption(learned), learned[:50])
    learned = learned.expand(-1, CHANNELS)
    negative = null_caption(learned, tokens=tokens, choice=TokenChoice(negative=True))
    assert negative[:5, 0].tolist() == [4.0, 0.0, 2000.0, 1000.0, 0.0]
    assert len(negative) == 50


def test_tokens_are_rounded_to_float16_as_released(tmp_path: Path):
    third = np.full((1, CHANNELS), 1 / 3)
    path = tmp_path / "special_tokens.npz"
    np.savez(path, caption_token=third, logo_token=third, other_tokens=np.zeros((100, CHANNELS)))
    tokens = load_special_tokens(path, channels=CHANNELS)
    assert tokens.negative()[0][0, 0].item() == np.float16(1 / 3)


SIZES = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
NOT_FINITE = "other_tokens holds numbers that are not finite in float16"
MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"other_tokens": np.zeros((99, 2))}, r"other_tokens has shape \[99, 2\], expected \[100, 2\]"),
    ({"logo_token": np.zeros((1, 3))}, r"logo_token has shape \[1, 3\], expected \[1, 2\]"),
    ({"logo_token": None}, "has no array logo_token"),
    ({"other_tokens": np.full((100, 2), np.nan)}, NOT_FINITE),
    ({"other_tokens": np.full((100, 2), 1e5)}, NOT_FINITE),
    ({"other_tokens": np.zeros((100, 2)).astype(str)}, "holds <U32, expected real numbers"),
    ({"other_tokens": np.zeros((100, 2)) * 1j}, "holds complex128, expected real numbers"),
    ({"other_tokens": np.zeros((100, 2), bool)}, "holds bool, expected real numbers"),
    ({"other_tokens": np.zeros((100, 2)).astype(object)}, "not a readable npz file"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_tokens_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    arrays = {name: np.zeros((num, CHANNELS)) for name, num in SIZES.items()} | changes
    path = tmp_path / "tokens.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message):
        load_special_tokens(path, channels=CHANNELS)
    path.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not a readable npz file"):
        load_special_tokens(path, channels=CHANNELS)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_special_tokens(path, channels=CHANNELS)


def damaged(content: bytes) -> dict[str, bytes]:
    """Return a file cut short and with flipped bytes in each of its parts."""
    step = len(content) // 12
    flipped = {
        f"flip{place}": content[: place * step]
        + bytes(byte ^ 0x55 for byte in content[place * step : place * step + 16])
        + content[place * step + 16 :]
        for place in range(12)
    }
    return flipped | {f"cut{part}": content[: len(content) * part // 7] for part in range(7)}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_one_line_or_what_it_was(tmp_path: Path, save: Callable[..., None]):
    path, draw = tmp_path / "tokens.npz", np.random.default_rng(0)
    arrays = {name: draw.normal(size=(num, CHANNELS)) for name, num in SIZES.items()}
    save(path, **arrays)
    for kind, content in damaged(path.read_bytes()).items():
        path.write_bytes(content)
        told, read = "", None
        try:
            read = load_special_tokens(path, channels=CHANNELS)
        except UserError as error:
            told = str(error)
        if read is None:
            assert told.startswith(f"{path}: "), kind
            assert "\n" not in told, kind
        else:  # what was damaged is not read, as the time of a file
            assert np.array_equal(read.other.numpy(), arrays["other_tokens"].astype(np.float32))
