"""For any input, a command succeeds or ends with one line and exit code 2, within seconds.

Settings, texts, JSON documents and damaged files are made up by hypothesis: few in the default run,
always the same ones; thousands of others in the runs marked `slow`.
"""

import contextlib
import copy
import io
import json
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from flowcache.bench.protocol import read_protocol
from flowcache.bench.table import read_report
from flowcache.bench.tasks import Task, flaw
from flowcache.report.page import Clip, write_page
from flowcache.report.run import load_run
from flowcache.runtime import weights
from flowcache.runtime.cli import run_command
from flowcache.runtime.config import read_yaml
from flowcache.runtime.metrics import open_clip
from flowcache.runtime.model import Request, load_model
from flowcache.runtime.profile import read_profile
from flowcache.runtime.record import read_record
from flowcache.runtime.run import describe as describe_run
from flowcache.runtime.run import prepare, read_settings
from flowcache.runtime.video import VideoWriter, probe, read_image, read_video
from magi1.config import read_config
from magi1.text import load_special_tokens

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_SECONDS = 20
"""Of one example. The slowest takes one second alone; other tests run at the same time."""
BASE = {
    "skyreels_v2": ("prompt=x", "num_frames=5", "base_num_frames=5", "num_steps=2"),
    "magi1": ("prompt=x", "runtime_config.num_frames=24", "runtime_config.num_steps=16"),
}

NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([16, 97, 1000, 4096, 10**6, 10**9, 10**18, 2**63, 10**400, -(10**18)]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), float("nan"), 0.1]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *("", "null", "true", "~", "auto", "demo", "cpu", "cuda:9", "none", "???", "${a}"),
            *("[" * 100_000, "{a: " * 400, "a" * 20_000, "x" * 300, "d/" * 5000, "~nobody/x"),
            *("\0", "\udcff", "\ud800", "a\nb", "\x1b[31m", "/dev/zero", "/dev/null/x", ".", "/"),
            *("&a [*a]", "!!python/object:os.system {}", "2001-99-99", "1:99:99", "0x", "[1, [2]]"),
            *("24GB", "a: b"),
        ]
    ),
)
VALUES = st.one_of(NUMBERS, st.booleans(), st.none(), TEXTS)
JSON_VALUES = st.one_of(VALUES, st.lists(NUMBERS, max_size=3), st.dictionaries(TEXTS, NUMBERS))


def property_of(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the settings of a property: always the same examples, no own clock."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def ends_well(command: Callable[[], object]) -> int:
    """Run a command as the command line does; check how it ended and return its exit code."""
    said, start = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run_command(lambda: (command(), None)[1])
    lines = [line for line in said.getvalue().split("\n") if line.startswith("error:")]
    assert code in (0, 2)
    assert len(lines) == (code == 2)
    if code == 2:
        assert said.getvalue().endswith(lines[0] + "\n"), "the error is one line, the last one"
        assert len(lines[0]) < 2100
    assert time.process_time() - start < MAX_SECONDS
    return code


# Settings -----------------------------------------------------------------------------------------


SLOW = pytest.mark.slow
Settings = list[tuple[str, Any]]


@pytest.mark.parametrize(
    ("family", "examples"),
    [
        *(("skyreels_v2", 15), ("magi1", 12)),
        *(pytest.param(family, 1000, marks=SLOW) for family in BASE),
    ],
)
def test_any_settings_are_planned_or_refused_in_one_line(
    family: str, examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # where relative paths among the settings lead
    config = read_settings(load_model(family), Request("vanilla", "demo", ["prompt=x"]))
    lines = config.lines()
    key = st.sampled_from([line.partition(":")[0] for line in lines])
    name = st.one_of(st.none(), st.none(), st.none(), TEXTS)

    @property_of(examples)
    @given(st.lists(st.tuples(key, VALUES), min_size=1, max_size=3), name, name, name, name)
    def check(
        changes: Settings,
        preset: str | None,
        model: str | None,
        out: str | None,
        replay: str | None,
    ) -> None:
        request = Request(
            preset=preset or "flowcache_fast",
            model=model or "demo",
            overrides=[*BASE[family], *(f"{key}={_text(value)}" for key, value in changes)],
            out=str(tmp_path / "o.mp4") if out is None else out,
            replay=replay,
            is_dry=True,
        )
        ends_well(lambda: describe_run(prepare(load_model(family), request)))

    check()


def _text(value: object) -> str:
    """Write a value as on the command line; Python itself refuses to write very long numbers."""
    if isinstance(value, int) and abs(value) > 10**300:
        return "1" + "0" * 400
    return "null" if value is None else str(value)


# JSON and tables ----------------------------------------------------------------------------------


def changed(document: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """Return a copy of a document in which one value is another one, missing, or new."""
    document = copy.deepcopy(document)
    owner, name = None, None
    value = document
    while isinstance(value, (dict, list)) and value and (owner is None or draw(st.booleans())):
        owner = value
        name = draw(
            st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value)))
        )
        value = owner[name]
    if owner is None:
        return draw(JSON_VALUES)
    kind = draw(st.sampled_from(["other", "other", "missing", "new"]))
    if kind == "missing":
        del owner[name]
    elif kind == "new" and isinstance(owner, dict):
        owner[draw(TEXTS)] = draw(JSON_VALUES)
    else:
        owner[name] = draw(JSON_VALUES)
    return document


def as_bytes(document: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """Return a document as JSON, sometimes cut short, too deep, or in another encoding."""
    text = json.dumps(document)
    kind = draw(st.sampled_from(["plain"] * 6 + ["cut", "deep", "bom", "utf-16", "latin-1"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))].encode()
    if kind == "deep":
        return text.encode().replace(b":", b":" + b"[" * 100_000, 1)
    if kind == "latin-1":
        return text.encode() + b"\xe9"
    return text.encode({"bom": "utf-8-sig"}.get(kind, "utf-8" if kind == "plain" else kind))


RECORD: dict[str, Any] = {
    "schema_version": 1,
    "video": "a.mp4",
    "model": "demo",
    "preset": "flowcache_fast",
    "policy": "flowcache",
    "threshold": 0.1,
    "num_steps": 2,
    "config": {"reuse": {"policy": "flowcache"}},
    "chunk_frames": {"0": [[0, 5]]},
    "ticks": [{"segment": 0, "tick": tick, "seconds": 0.1} for tick in range(2)],
    "decisions": [
        {"segment": 0, "tick": tick, "chunk": 0, "step": tick, "branch": branch, "computed": True}
        | {"distance": None, "accumulated": 0.5, "flops": 9, "flops_saved": 0, "seconds": None}
        for branch in ("cond", "uncond")
        for tick in range(2)
    ],
    "kv": [{"segment": 0, "tick": 1, "branch": "cond", "tokens": {"0": 16.0}}],
    "stages": {"dit": {"seconds": 1.0, "num_uses": 2, "within": None}},
    "environment": {"torch": "2"},
}
REPORT = {"stats": {"timeline": [["dit", 0.0, 1.0, False]]}}


TASK = Task("a", "magi1", "demo", "base", "x", 0)
MAGI1 = REPOSITORY / "FlowCache4MAGI-1" / "demo"


def explain(path: Path) -> None:
    write_page([load_run(path, "A")], [Clip(None, "there is none")], None)


DOCUMENTS: Mapping[str, tuple[str, Callable[[], Any], Callable[[Path], object]]] = {
    "record": ("a.record.json", lambda: RECORD, read_record),
    "page": ("a.record.json", lambda: RECORD, explain),
    "timeline": ("a.json", lambda: REPORT, lambda path: explain(path.with_name("a.record.json"))),
    "table": ("table.json", lambda: {"schema_version": 1}, lambda path: read_report(path.parent)),
    "receipt": (
        "a.json",
        lambda: {"task": TASK.to_dict(), "sha256": "0"},
        lambda path: flaw(TASK, path.parent),
    ),
    "magi config": (
        "a.json",
        lambda: json.loads((MAGI1 / "distill_config.json").read_text()),
        read_config,
    ),
    "profile": (
        "a.yaml",
        lambda: read_yaml(next((MAGI1 / "profiles").glob("*.yaml"))),
        read_profile,
    ),
    "protocol": (
        "a.yaml",
        lambda: read_yaml(REPOSITORY / "scripts" / "protocols" / "magi1_demo.yaml"),
        lambda path: read_protocol(path).tasks(None),
    ),
}
"""Name -> name of the file, a right document, what reads it."""


@pytest.mark.parametrize("examples", [15, pytest.param(1000, marks=SLOW)])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_any_document_is_read_or_refused_in_one_line(name: str, examples: int, tmp_path: Path):
    file_name, make, read = DOCUMENTS[name]
    right, path = make(), tmp_path / file_name
    (tmp_path / "a.record.json").write_text(json.dumps(RECORD))
    path.write_text(json.dumps(right))
    if name != "table":  # a whole table is more than its reader looks at
        assert ends_well(lambda: read(path)) == 0

    @property_of(examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path.write_bytes(as_bytes(changed(right, data.draw), data.draw))
        ends_well(lambda: read(path))

    check()


# Damaged files ------------------------------------------------------------------------------------


def make_safetensors(path: Path) -> None:
    save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 3, dtype=torch.bfloat16)}, path)


def make_pickle(path: Path) -> None:
    torch.save({"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, path)


def make_image(path: Path) -> None:
    Image.linear_gradient("L").resize((20, 12)).convert("RGB").save(path)


def make_video(path: Path) -> None:
    with VideoWriter(path, fps=8, size=(16, 16), overwrite=True) as writer:
        writer.append(np.zeros((3, 16, 16, 3), dtype=np.uint8))


def look(path: Path) -> None:
    probe(path)
    read_video(path, max_frames=2)


Reader = Callable[[Path], object]
FILES: Mapping[str, tuple[Reader, Reader]] = {
    "a.safetensors": (make_safetensors, lambda path: list(weights.read([path]))),
    "a.pth": (make_pickle, lambda path: list(weights.read([path]))),
    "tokens.npz": (
        lambda path: shutil.copy(MAGI1 / "special_tokens.npz", path),
        lambda path: load_special_tokens(path, channels=64),
    ),
    "frames.npy": (
        lambda path: np.save(path, np.zeros((2, 4, 4, 3), dtype=np.uint8)),
        lambda path: list(open_clip(path).frames),
    ),
    "a.png": (make_image, read_image),
    "a.jpg": (make_image, read_image),
    "a.mp4": (make_video, look),
}


def damaged(content: bytes, draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """Return a file cut short, with other bytes, or with a huge number in it."""
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    kind = draw(st.sampled_from(["cut", "flip", "start", "huge", "empty", "more"]))
    if kind == "cut":
        return content[:at]
    if kind == "empty":
        return b""
    if kind == "more":
        return content + draw(st.binary(max_size=20))
    if kind == "huge":
        return content[:at] + struct.pack("<Q", 2**63 - 1) + content[at + 8 :]
    at = at % 64 if kind == "start" else at
    return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        *((name, 6 if name == "a.mp4" else 30) for name in FILES),
        *(pytest.param(name, 100 if name == "a.mp4" else 2000, marks=SLOW) for name in FILES),
    ],
)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, examples: int, tmp_path: Path):
    make, read = FILES[name]
    path = tmp_path / name
    make(path)
    content = path.read_bytes()
    assert ends_well(lambda: read(path)) == 0

    @property_of(examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path.write_bytes(damaged(content, data.draw))
        ends_well(lambda: read(path))

    check()
