"""The same mistake through every door: one line, no traceback, and nothing is lost."""

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui import load_nodes, stand_in
from fastapi.testclient import TestClient
from PIL import Image

from flowcache.api import Pipeline
from flowcache.errors import UserError
from flowcache.serve.app import make_app
from flowcache.serve.jobs import DONE, WAITING, Jobs
from flowcache.serve.page import mount_page
from skyreels_v2.diffusers_pipeline import SkyReelsV2FlowCachePipeline

PROMPT = "a red circle moving right on a black background"
Given = dict[str, Any]
Door = Callable[[Given], str]
"""From settings, `prompt` and `preset` among them, to the line of the refusal."""
UPLOAD_BYTES = 10**6


@pytest.fixture
def jobs(pipe: Pipeline, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(pipe, tmp_path / "jobs", max_waiting=64, max_bytes=10**9)
    yield made
    made.close()


@pytest.fixture
def client(jobs: Jobs) -> Iterator[TestClient]:
    """A client of service and page."""
    app = make_app(jobs, max_upload_bytes=UPLOAD_BYTES)
    app = mount_page(app, jobs, max_upload_bytes=UPLOAD_BYTES)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


# The doors ----------------------------------------------------------------------------------------


def python_door(pipe: Pipeline) -> Door:
    def ask(given: Given) -> str:
        with pytest.raises(UserError) as error:
            pipe(**{"prompt": PROMPT, **given})
        with pytest.raises(UserError, match=re.escape(str(error.value))):
            pipe.stream(**{"prompt": PROMPT, **given})
        return str(error.value)

    return ask


def http_door(client: TestClient) -> Door:
    def ask(given: Given) -> str:
        content = json.dumps({"prompt": PROMPT, **given})  # NaN as NaN, as other clients write it
        header = {"content-type": "application/json"}
        answer = client.post("/v1/videos", content=content, headers=header)
        assert 400 <= answer.status_code < 500
        return answer.json()["error"]["message"]

    return ask


def ask_page(client: TestClient, *fields: Any) -> str:
    """Press Generate; return what the page is told."""
    called = client.post("/gradio_api/call/start", json={"data": fields})
    assert called.status_code == 200
    return client.get(f"/gradio_api/call/start/{called.json()['event_id']}").text


PAGE_FIELDS = {"prompt": PROMPT, "preset": "flowcache_fast", "num_frames": 33, "seed": 0}
PAGE_FIELDS |= {"reuse.threshold": "", "num_steps": "", "image": None}


def page_door(client: TestClient) -> Door:
    def ask(given: Given) -> str:
        assert given.keys() <= PAGE_FIELDS.keys()
        event = ask_page(client, *{**PAGE_FIELDS, **given}.values())
        assert event.startswith("event: error")
        return json.loads(event.partition("data: ")[2])["error"]

    return ask


def node_door(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Door:
    stand_in(monkeypatch)
    node = load_nodes()["FlowCacheVideo"]()

    def ask(given: Given) -> str:
        fields = {"prompt": PROMPT, "seed": 0, **given}
        own = {key: fields.pop(key) for key in ("prompt", "seed", "preset") if key in fields}
        lines = "\n".join(f"{key}={value}" for key, value in fields.items())
        with pytest.raises(UserError) as error:
            node.make(pipe, **own, settings=lines)
        return str(error.value)

    return ask


def diffusers_door() -> Door:
    pipe = SkyReelsV2FlowCachePipeline.from_pretrained("demo", num_frames=17, num_steps=4)
    pipe.set_progress_bar_config(disable=True)
    names = {"num_steps": "num_inference_steps", "guidance": "guidance_scale"}

    def ask(given: Given) -> str:
        call = {names.get(key, key): value for key, value in given.items()}
        with pytest.raises(UserError) as error:
            pipe(**{"prompt": PROMPT, **call})
        return str(error.value)

    return ask


NAN = float("nan")
CASES: list[tuple[Given, str, str]] = [
    ({"prompt": ""}, "prompt is empty: say what the video shows", "python http page node"),
    ({"prompt": " \n"}, "prompt is empty: say what the video shows", "python http page node"),
    ({"prompt": "a \0 b"}, "prompt holds a NUL character", "python http page node"),
    ({"prompt": "a" * 20_000}, "prompt has 20000 characters", "python http page node"),
    ({"prompt": 3}, "prompt must be text, not 3", "python http node"),
    ({"prompt": ["a", "b"]}, "prompt must be text, not ['a', 'b']", "python http node"),
    ({"prompt": {"a": 1}}, "prompt must be", "python http node diffusers"),
    ({"num_frames": 98}, "num_frames must be 4 n + 1", "python http page node"),
    ({"num_frames": 10**15}, "num_frames must be in 1..1000000", "python http page node"),
    ({"num_frames": 999_997, "num_steps": "999"}, "make a shorter video", "python http page node"),
    ({"num_frames": -3}, "num_frames must be in 1..1000000, not -3", "python http page node"),
    (
        {"num_frames": NAN},
        "num_frames is nan, but must be a whole number, in 1..1000000",
        "python http",
    ),
    (
        {"num_frames": "many"},
        "num_frames is 'many', but must be a whole number",
        "python http node",
    ),
    ({"num_frames": True}, "num_frames is True, but must be a whole number", "python http"),
    ({"seed": -1}, "seed must be in 0..9223372036854775807, not -1", "python http page node"),
    ({"seed": 1e300}, "seed is 1e+300, but must be a whole number", "python http"),
    ({"num_steps": 0}, "num_steps must be in 1..1000, not 0", "python http node diffusers"),
    ({"num_steps": "0"}, "num_steps must be in 1..1000, not 0", "python http page node"),
    ({"guidance": -1}, "guidance must be in 0..1000, not -1", "python http node diffusers"),
    ({"height": 65}, "height must be a multiple of 16", "python http node diffusers"),
    ({"width": 2**40}, "width must be in 16..4096", "python http node diffusers"),
    ({"reuse.threshold": "-1"}, "reuse.threshold must be in", "python http page node"),
    (
        {"reuse.threshold": "x"},
        "reuse.threshold is 'x', but must be a number",
        "python http page node",
    ),
    ({"num_framez": 3}, "num_framez", "python http node diffusers"),
    ({"preset": "nosuch"}, "preset 'nosuch' is unknown", "python http node"),
    ({"preset": "/etc/passwd"}, "preset '/etc/passwd' is unknown", "python http node"),
]


@pytest.mark.parametrize("door", ["python", "http", "page", "node", "diffusers"])
def test_a_mistake_is_the_same_line_through_every_door_and_nothing_is_lost(
    door: str,
    pipe: Pipeline,
    jobs: Jobs,
    client: TestClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    kept = jobs.add(PROMPT, preset=None, settings={"num_frames": 17}, files={})
    assert jobs.wait(lambda: kept.status not in WAITING, timeout_seconds=60)
    before = sorted(tmp_path.rglob("*"))
    asks = {
        "python": lambda: python_door(pipe),
        "http": lambda: http_door(client),
        "page": lambda: page_door(client),
        "node": lambda: node_door(pipe, monkeypatch),
        "diffusers": diffusers_door,
    }
    ask = asks[door]()
    tried = [(given, words) for given, words, doors in CASES if door in doors.split()]
    assert len(tried) > 5
    for given, words in tried:
        line = ask(given)
        assert words in line, given
        assert line.isprintable(), line
        assert "Traceback" not in line
        assert str(jobs.folder) not in line
    assert sorted(tmp_path.rglob("*")) == before
    assert [*jobs.jobs] == [kept.id]
    assert kept.status == DONE
    assert not caplog.records
    assert len(pipe(PROMPT, num_frames=17, num_steps=2).frames) == 17  # the model is free


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"prompt": []}, "prompt must be a text or a list of texts, not []"),
        ({"prompt": ["a", 3]}, "prompt must be a text or a list of texts, not ['a', 3]"),
        ({"negative_prompt": 3}, "negative_prompt must be a text or a list of texts, not 3"),
        ({"num_frames": "x"}, "num_frames is 'x', but must be a whole number"),
        ({"guidance_scale": NAN}, "guidance is nan, but must be a number, in 0..1000"),
        ({"num_videos_per_prompt": -1}, "num_videos_per_prompt must be 1 or more, not -1"),
        ({"generator": "x"}, "generator must be a Generator, not 'x'"),
        ({"latents": "x"}, "latents must be a Tensor, not 'x'"),
        ({"output_type": "gif"}, "output_type 'gif' is none of np, pil, pt, latent"),
        ({"seed": 3}, "unknown argument 'seed'"),
    ],
)
def test_wrong_arguments_of_the_form_of_diffusers_are_one_line(call: Given, words: str):
    assert diffusers_door()(call).startswith(words)


# What only some doors can be given ----------------------------------------------------------------


def files_of(name: str, content: bytes, kind: str = "image/png") -> Any:
    return {"input_reference": (name, content, kind)}


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        (files_of("a.png", b"no picture"), 400, "image"),
        (files_of("a.mp4", b"no video", "video/mp4"), 400, "video"),
        (files_of("a.png", b""), 400, "image"),
        (files_of("a.png", b"x" * UPLOAD_BYTES), 413, "at most 1 MB"),
        ({"other": ("a.png", b"x", "image/png")}, 400, "other is unknown: upload input_reference"),
        ({"../../x": ("a.png", b"x", "image/png")}, 400, "../../x is unknown"),
    ],
)
def test_an_upload_that_does_not_fit_is_refused(
    files: Any, status: int, words: str, client: TestClient, jobs: Jobs
):
    answer = client.post("/v1/videos", data={"prompt": PROMPT}, files=files)
    message = answer.json()["error"]["message"]
    assert (answer.status_code, words in message) == (status, True), answer.text
    assert message.isprintable()
    assert str(jobs.folder) not in message
    assert not any(jobs.folder.iterdir())


def test_the_name_of_an_upload_names_no_place(client: TestClient, jobs: Jobs, tmp_path: Path):
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    before = {path for path in tmp_path.rglob("*") if "jobs" not in path.parts}
    files = files_of("../../../../escaped.png", picture.read_bytes())
    fields = {"prompt": PROMPT, "num_frames": "17", "num_steps": "2"}
    answer = client.post("/v1/videos", data=fields, files=files)
    assert answer.status_code == 200
    (job,) = jobs.jobs.values()
    assert jobs.wait(lambda: job.status not in WAITING, timeout_seconds=60)
    assert job.status == DONE
    assert (jobs.folder / job.id / "input.image").is_file()
    assert {path for path in tmp_path.rglob("*") if "jobs" not in path.parts} == before


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "words"),
    [
        ("get", "/v1/videos?limit=many", {}, 400, "limit: "),
        ("get", "/v1/videos?limit=0", {}, 400, "limit: "),
        ("get", "/v1/videos?order=sideways", {}, 400, "order: "),
        ("get", "/v1/videos/video_0", {}, 404, "there is no video video_0"),
        ("get", "/v1/videos/%00%1b", {}, 404, "there is no video "),
        ("delete", "/v1/videos/video_0", {}, 404, "there is no video video_0"),
        ("post", "/v1/videos/video_0/cancel", {"content": b""}, 404, "there is no video video_0"),
        ("get", "/v1/videos/video_0/ticks?start=x", {}, 400, "start: "),
        ("post", "/v1/videos", {"headers": {"content-length": "9" * 5000}}, 413, "at most 1 MB"),
        ("post", "/v1/videos", {"headers": {"content-length": "-1"}}, 411, "Content-Length"),
        ("post", "/v1/videos", {"data": {"prompt": PROMPT, "seed": "x"}}, 400, "seed is 'x'"),
        (
            *("post", "/v1/videos"),
            {"content": b"--x", "headers": {"content-type": "multipart/form-data"}},
            *(400, "boundary"),
        ),
        (
            *("post", "/v1/videos"),
            {"json": {"prompt": PROMPT}, "headers": {"origin": "http://elsewhere.example"}},
            *(403, "another origin"),
        ),
        (
            *("post", "/v1/videos"),
            {
                "content": b'{"prompt": "a \\ud800 b"}',
                "headers": {"content-type": "application/json"},
            },
            *(400, "prompt is not valid UTF-8 text"),
        ),
    ],
)
def test_an_odd_request_gets_its_status_and_one_line(
    method: str, path: str, more: Any, status: int, words: str, client: TestClient, jobs: Jobs
):
    answer = client.request(method, path, **more)
    message = answer.json()["error"]["message"]
    assert (answer.status_code, words in message) == (status, True), answer.text
    assert message.isprintable()
    assert not any(jobs.folder.iterdir())


@pytest.mark.parametrize("path", ["/v1/videos/a/b/c", "/v1/videos/..%2f..%2fetc%2fpasswd"])
def test_an_id_with_slashes_leads_nowhere(path: str, client: TestClient):
    for method in ("get", "delete"):
        assert 400 <= client.request(method, path).status_code < 500


def test_an_error_of_ours_is_a_line_without_a_traceback(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("flowcache.serve.app.video_of", fail)
    answer = client.post("/v1/videos", json={"prompt": PROMPT})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "internal error: ZeroDivisionError"


def test_the_page_reads_uploads_and_no_other_file(client: TestClient, jobs: Jobs, tmp_path: Path):
    secret = tmp_path / "secret.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(secret)
    sent = client.post(
        "/gradio_api/upload", files={"files": ("a.png", secret.read_bytes(), "image/png")}
    )
    (uploaded,) = sent.json()
    meta = {"meta": {"_type": "gradio.FileData"}}
    for picture in ({"path": str(secret)}, {"path": str(secret), **meta}, {"url": str(secret)}):
        fields = {**PAGE_FIELDS, "num_frames": 17, "num_steps": "2", "image": picture}
        event = ask_page(client, *fields.values())
        assert event.startswith("event: error"), event
    assert not jobs.jobs
    fields = {
        **PAGE_FIELDS,
        "num_frames": 17,
        "num_steps": "2",
        "image": {"path": uploaded, **meta},
    }
    assert ask_page(client, *fields.values()).startswith("event: complete")
    assert len(jobs.jobs) == 1
    assert client.get(f"/gradio_api/file={secret}").status_code in (403, 404)
    large = {"files": ("a.png", b"x" * (UPLOAD_BYTES + 1), "image/png")}
    assert client.post("/gradio_api/upload", files=large).status_code == 413
