"""Special tokens before the prompt of every chunk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache.errors import UserError
from magi1.config import TokenChoice
from magi1.text import NO_TOKENS, SpecialTokens, chunk_captions, load_special_tokens, null_caption

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


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("other_tokens", (99, CHANNELS), r"other_tokens has shape \[99, 2\], expected \[100, 2\]"),
        ("logo_token", (1, 3), r"logo_token has shape \[1, 3\], expected \[1, 2\]"),
        ("logo_token", None, "has no array logo_token"),
    ],
)
def test_a_file_of_the_wrong_shape_is_refused(
    name: str, shape: tuple[int, int] | None, message: str, tmp_path: Path
):
    arrays = {
        "caption_token": np.zeros((1, CHANNELS)),
        "logo_token": np.zeros((1, CHANNELS)),
        "other_tokens": np.zeros((100, CHANNELS)),
    }
    if shape is None:
        del arrays[name]
    else:
        arrays[name] = np.zeros(shape)
    np.savez(tmp_path / "tokens.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_special_tokens(tmp_path / "tokens.npz", channels=CHANNELS)


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
    sizes = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
    arrays = {name: draw.normal(size=(num, CHANNELS)) for name, num in sizes.items()}
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array * np.nan, "other_tokens holds numbers that are not finite in float16"),
        (lambda array: array + 1e5, "other_tokens holds numbers that are not finite in float16"),
        (lambda array: array.astype(str), "other_tokens holds <U32, expected real numbers"),
        (lambda array: array * 1j, "other_tokens holds complex128, expected real numbers"),
        (lambda array: array.astype(bool), "other_tokens holds bool, expected real numbers"),
        (lambda array: array.astype(object), "not a readable npz file"),
    ],
)
def test_tokens_that_are_no_numbers_are_refused(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], message: str
):
    path = tmp_path / "tokens.npz"
    sizes = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
    arrays = {name: np.zeros((num, CHANNELS)) for name, num in sizes.items()}
    np.savez(path, **arrays | {"other_tokens": change(arrays["other_tokens"])})
    with pytest.raises(UserError, match=message):
        load_special_tokens(path, channels=CHANNELS)


def test_a_missing_or_broken_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        load_special_tokens(tmp_path / "tokens.npz", channels=CHANNELS)
    (tmp_path / "tokens.npz").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not a readable npz file"):
        load_special_tokens(tmp_path / "tokens.npz", channels=CHANNELS)
