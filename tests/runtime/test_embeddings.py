import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.embeddings import cached_embedding, hash_files

FACTS = {"prompts": ["a swan"], "encoder": "abc"}
VALUE = torch.arange(12, dtype=torch.bfloat16).view(3, 4)


def never() -> Tensor:
    raise AssertionError("the prompt is known")


def test_a_known_prompt_is_read_and_equal_to_the_bit(tmp_path: Path):
    made = cached_embedding(str(tmp_path), FACTS, lambda: VALUE)
    known = cached_embedding(str(tmp_path), FACTS, never)
    assert torch.equal(made, VALUE)
    assert torch.equal(known, VALUE)
    assert known.dtype == torch.bfloat16
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("changed", [{"prompts": ["a cat"]}, {"encoder": "def"}, {"length": 3}])
def test_another_prompt_encoder_or_setting_is_another_entry(
    tmp_path: Path, changed: dict[str, object]
):
    cached_embedding(str(tmp_path), FACTS, lambda: VALUE)
    other = cached_embedding(str(tmp_path), FACTS | changed, lambda: VALUE + 1)
    assert torch.equal(other, VALUE + 1)
    assert len(list(tmp_path.iterdir())) == 2


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def damage_value(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [damage_end, damage_value, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_told_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
):
    cached_embedding(str(tmp_path), FACTS, lambda: VALUE)
    (path,) = tmp_path.iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = cached_embedding(str(tmp_path), FACTS, lambda: VALUE)
    assert torch.equal(again, VALUE)
    assert "is damaged" in caplog.text
    assert "encoded again" in caplog.text
    assert torch.equal(cached_embedding(str(tmp_path), FACTS, never), VALUE)


def test_a_folder_that_cannot_be_written_is_an_error_before_encoding(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in folder"):
        cached_embedding(str(tmp_path / "file" / "inside"), FACTS, never)


def test_a_failed_encoding_leaves_nothing(tmp_path: Path):
    with pytest.raises(AssertionError):
        cached_embedding(str(tmp_path), FACTS, never)
    assert not list(tmp_path.iterdir())


def test_files_are_hashed_by_name_and_content(tmp_path: Path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x")
    second.write_text("x")
    assert hash_files([first]) != hash_files([second])
    assert hash_files([first, second]) == hash_files([second, first])
    before = hash_files([first])
    first.write_text("y")
    assert hash_files([first]) != before
