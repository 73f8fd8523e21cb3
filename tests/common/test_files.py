import json
import os
from pathlib import Path

import pytest

from flowcache.errors import UserError
from flowcache.files import check_writable, fresh_path, write_json, write_text


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
