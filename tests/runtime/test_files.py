import json
import os
from pathlib import Path

import pytest

from flowcache.errors import UserError
from flowcache.runtime.files import (
    MAX_JSON_DEPTH,
    check_writable,
    fresh_path,
    made_folder,
    parse_json,
    read_json,
    read_json_lines,
    write_json,
    write_text,
)


def test_fresh_paths_count_up(tmp_path: Path):
    assert fresh_path(tmp_path, "clip", ".mp4") == tmp_path / "clip.mp4"
    (tmp_path / "clip.mp4").touch()
    assert fresh_path(tmp_path, "clip", ".mp4") == tmp_path / "clip-001.mp4"
    (tmp_path / "clip-001.mp4").touch()
    assert fresh_path(tmp_path, "clip", ".mp4") == tmp_path / "clip-002.mp4"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write in folder {folder}: "):
            check_writable(folder)


def test_a_new_folder_is_removed_if_a_refusal_leaves_it_empty(tmp_path: Path):
    old, new = tmp_path / "old", tmp_path / "a" / "b"
    old.mkdir()
    for folder in (old, new):
        with pytest.raises(UserError, match="no"), made_folder(folder):
            assert folder.is_dir()
            raise UserError("no")
    assert os.listdir(tmp_path) == ["old"]
    with pytest.raises(UserError, match="no"), made_folder(new):
        (new / "result").touch()
        raise UserError("no")
    assert (new / "result").is_file()


def test_of_json_lines_only_a_last_one_that_was_cut_short_is_left_out(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    assert read_json_lines(path, advice="delete it") == []
    for end in ('{"n": 3', '{"n": 3}', '{"n": \n', "\0\0\n"):
        path.write_text('{"n": 1}\n{"n": 2}\n' + end)
        assert read_json_lines(path, advice="delete it") == [{"n": 1}, {"n": 2}]
        assert path.read_text().endswith(end)
        assert read_json_lines(path, advice="", repairs=True) == [{"n": 1}, {"n": 2}]
        assert path.read_text() == '{"n": 1}\n{"n": 2}\n'
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(UserError, match="line 2 is damaged: delete it"):
        read_json_lines(path, advice="delete it")


def test_json_is_readable_with_tables_in_rows(tmp_path: Path):
    content = {"name": "猫", "rows": [[1, "a", None], [2, "b", 0.5]], "none": [], "empty": {}}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert text == (
        '{\n  "name": "猫",\n  "rows": [\n    [1, "a", null],\n    [2, "b", 0.5]\n  ],\n'
        '  "none": [],\n  "empty": {}\n}\n'
    )


def test_a_file_gets_its_name_only_when_its_content_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        text = Path(f"/proc/self/fd/{descriptor}").read_text()
        seen.append((text, (tmp_path / "a.txt").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.txt", "whole")
    assert seen == [("whole", False)]
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "a.json" / "b.json", {})


def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path: Path):
    for name, start in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(start + '{"name": "猫"}'.encode())
        assert read_json(tmp_path / name) == {"name": "猫"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "more than 100 nested brackets"),
        (b'{"a":' * 100_000, "more than 100 nested brackets"),
        (b'{"a": 1', "Expecting ',' delimiter: line 1 column 8"),
        (b"", "Expecting value: line 1 column 1"),
        (b"1" * 10_000, "Exceeds the limit"),
        ("{}".encode("utf-16"), "not UTF-8 text"),
        (b"\x00\x05\x16\x07", "Expecting value"),
    ],
    ids=["lists", "objects", "cut short", "empty", "long number", "UTF-16", "AppleDouble"],
)
def test_broken_json_is_named_in_one_line(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path, advice="download it again")
    assert str(error.value).startswith(f"{path}: not a readable JSON file (")
    assert reason in str(error.value)
    assert str(error.value).endswith("); download it again")
    assert "\n" not in str(error.value)


def test_json_that_cannot_be_opened_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_json(tmp_path)


def test_brackets_are_counted_outside_strings_only():
    deepest = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert parse_json(deepest, source="a") is not None
    with pytest.raises(UserError, match="nested brackets"):
        parse_json(f"[{deepest}]", source="a")
    text = json.dumps(["[" * 200, '"' + "{" * 200, "\\" * 200, *([0] for _ in range(200))])
    assert parse_json(text, source="a") == json.loads(text)
