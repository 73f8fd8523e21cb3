"""Whatever is given, a command succeeds or ends with one line and exit code 2, within seconds.

Settings, texts, JSON documents and damaged files are made up by hypothesis: few in the default run,
always the same ones; thousands of others in the test marked `slow`.
"""

import contextlib
import copy
import io
import json
import shutil
import struct
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from flowcache.runtime import weights
from flowcache.runtime.cli import run_command
from flowcache.runtime.config import describe
from flowcache.runtime.metrics import open_clip
from flowcache.runtime.model import Request, load_model
from flowcache.runtime.profile import read_profile
from flowcache.runtime.record import read_record
from flowcache.runtime.run import describe as describe_run
from flowcache.runtime.run import prepare
from flowcache.runtime.video import VideoWriter, probe, read_image, read_video
from magi1.config import read_config
from magi1.text import load_special_tokens

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_SECONDS = 20
"""Of one example. The slowest takes one second alone; other tests run at the same time."""
FEW = {"skyreels_v2": 15, "magi1": 12}
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


def keys_of(family: str) -> list[str]:
    lines = describe(import_module(f"{family}.config").RunConfig)
    return [line.partition(":")[0] for line in lines]


def check_settings(family: str, folder: Path, *, examples: int) -> None:
    video_model = load_model(family)
    overrides = st.lists(
        st.tuples(st.sampled_from(keys_of(family)), VALUES), min_size=1, max_size=3
    )
    names = st.one_of(st.none(), st.none(), st.none(), TEXTS)

    @property_of(examples)
    @given(overrides, names, names, names, names)
    def check(
        changed: list[tuple[str, Any]],
        preset: str | None,
        model: str | None,
        out: str | None,
        replay: str | None,
    ) -> None:
        request = Request(
            preset=preset or "flowcache_fast",
            model=model or "demo",
            overrides=[*BASE[family], *(f"{key}={_text(value)}" for key, value in changed)],
            out=str(folder / "o.mp4") if out is None else out,
            replay=replay,
            is_dry=True,
        )
        ends_well(lambda: describe_run(prepare(video_model, request)))

    check()


def _text(value: object) -> str:
    """Write a value as on the command line; Python itself refuses to write very long numbers."""
    if isinstance(value, int) and abs(value) > 10**300:
        return "1" + "0" * 400
    return "null" if value is None else str(value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder: relative paths among the settings lead here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", BASE)
def test_any_settings_are_planned_or_refused_in_one_line(family: str, folder: Path):
    check_settings(family, folder, examples=FEW[family])


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


DOCUMENTS = (
    *("record", "page", "timeline", "table", "receipt", "magi config", "profile", "protocol"),
)


def explain(path: Path) -> None:
    run = import_module("flowcache.report.run").load_run(path, "A")
    no_clip = import_module("flowcache.report.page").Clip(None, "there is none")
    import_module("flowcache.report.page").write_page([run], [no_clip], None)


def yaml_of(path: Path) -> dict[str, Any]:
    return import_module("flowcache.runtime.config").read_yaml(path)


def documents() -> dict[str, tuple[str, Any, Callable[[Path], object]]]:
    """Return by name: name of the file, a right document, what reads it."""
    magi = json.loads((REPOSITORY / "FlowCache4MAGI-1/demo/distill_config.json").read_text())
    profile = next((REPOSITORY / "FlowCache4MAGI-1/demo/profiles").glob("*.yaml"))
    protocol = REPOSITORY / "scripts" / "protocols" / "magi1_demo.yaml"
    verify, protocols, tasks = (
        import_module(f"flowcache.bench.{name}") for name in ("verify", "protocol", "tasks")
    )
    task = tasks.Task("a", "magi1", "demo", "base", "x", 0)
    receipt = {"task": task.to_dict(), "sha256": "0"}
    return {
        "record": ("a.record.json", RECORD, read_record),
        "page": ("a.record.json", RECORD, explain),
        "timeline": ("a.json", REPORT, lambda path: explain(path.with_name("a.record.json"))),
        "table": (
            "table.json",
            {"schema_version": 1},
            lambda path: verify.read_table(path.parent),
        ),
        "receipt": ("a.json", receipt, lambda path: tasks.flaw(task, path.parent)),
        "magi config": ("a.json", magi, read_config),
        "profile": ("a.yaml", yaml_of(profile), read_profile),
        "protocol": (
            "a.yaml",
            yaml_of(protocol),
            lambda path: protocols.read_protocol(path).tasks(None),
        ),
    }


def check_documents(name: str, folder: Path, *, examples: int) -> None:
    file_name, right, read = documents()[name]
    (folder / "a.record.json").write_text(json.dumps(RECORD))
    path = folder / file_name
    path.write_text(json.dumps(right))
    if name != "table":  # a whole table is more than its reader looks at
        assert ends_well(lambda: read(path)) == 0

    @property_of(examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path.write_bytes(as_bytes(changed(right, data.draw), data.draw))
        ends_well(lambda: read(path))

    check()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_any_document_is_read_or_refused_in_one_line(name: str, folder: Path):
    check_documents(name, folder, examples=15)


# Damaged files ------------------------------------------------------------------------------------


def make_safetensors(path: Path) -> None:
    save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 3, dtype=torch.bfloat16)}, path)


def make_pickle(path: Path) -> None:
    torch.save({"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, path)


def make_tokens(path: Path) -> None:
    shutil.copy(REPOSITORY / "FlowCache4MAGI-1/demo/special_tokens.npz", path)


def make_frames(path: Path) -> None:
    np.save(path, np.zeros((2, 4, 4, 3), dtype=np.uint8))


def make_image(path: Path) -> None:
    Image.linear_gradient("L").resize((20, 12)).convert("RGB").save(path)


def make_video(path: Path) -> None:
    with VideoWriter(path, fps=8, size=(16, 16), overwrite=True) as writer:
        writer.append(np.zeros((3, 16, 16, 3), dtype=np.uint8))


def look(path: Path) -> None:
    probe(path)
    read_video(path, max_frames=2)


Reader = Callable[[Path], object]
FILES: Mapping[str, tuple[Callable[[Path], None], Reader]] = {
    "a.safetensors": (make_safetensors, lambda path: list(weights.read([path]))),
    "a.pth": (make_pickle, lambda path: list(weights.read([path]))),
    "tokens.npz": (make_tokens, lambda path: load_special_tokens(path, channels=64)),
    "frames.npy": (make_frames, lambda path: list(open_clip(path).frames)),
    "a.png": (make_image, read_image),
    "a.jpg": (make_image, read_image),
    "a.mp4": (make_video, look),
}
NUM_DAMAGED = {"a.mp4": 6}


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


def check_damage(name: str, folder: Path, *, examples: int) -> None:
    make, read = FILES[name]
    path = folder / name
    make(path)
    content = path.read_bytes()
    assert ends_well(lambda: read(path)) == 0

    @property_of(examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path.write_bytes(damaged(content, data.draw))
        ends_well(lambda: read(path))

    check()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, folder: Path):
    check_damage(name, folder, examples=NUM_DAMAGED.get(name, 30))


# Many more ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", BASE)
def test_thousands_of_settings_are_planned_or_refused(family: str, folder: Path):
    check_settings(family, folder, examples=1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_thousands_of_documents_are_read_or_refused(name: str, folder: Path):
    check_documents(name, folder, examples=1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_thousands_of_damaged_files_are_read_or_refused(name: str, folder: Path):
    check_damage(name, folder, examples=100 if name == "a.mp4" else 2000)
