"""The HTTP interface: OpenAI's form, refusals, the queue, restarts, many clients."""

import io
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from flowcache.api import Pipeline
from flowcache.runtime.video import read_video
from flowcache.serve.jobs import CANCELLED, DONE, FAILED, WAITING, Jobs

PROMPT = "a red circle moving right on a black background"
Start = Callable[..., Jobs]
ClientOf = Callable[..., TestClient]


def finished(jobs: Jobs, video_id: str) -> Any:
    job = jobs.jobs[video_id]
    assert jobs.wait(lambda: job.status not in WAITING, timeout_seconds=60)
    return job


def test_a_video_is_made_watched_and_removed(
    pipe: Pipeline, start: Start, client_of: ClientOf, tmp_path: Path
):
    jobs = start()
    client = client_of(jobs)
    made = client.post("/v1/videos", json={"prompt": PROMPT, "seed": 7}).json()
    assert made["object"] == "video"
    assert made["size"] == "64x64"
    live = client.get(f"/v1/videos/{made['id']}/stream").content  # ends with the job
    job = finished(jobs, made["id"])
    assert job.status == DONE
    assert 0 < job.first_part_seconds < job.total_seconds
    shown = client.get(f"/v1/videos/{made['id']}").json()
    assert (shown["status"], shown["progress"], shown["num_frames"]) == (DONE, 100, 33)
    content = client.get(f"/v1/videos/{made['id']}/content").content
    expected = pipe(PROMPT, seed=7)
    for name, data, tolerance in (("content", content, 4), ("live", live, 8)):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(data)
        frames, fps = read_video(path)
        assert (frames.shape, fps) == (expected.frames.shape, 24)
        # of 255; the codec's noise
        assert np.abs(frames.astype(float) - expected.frames).mean() < tolerance
    record = client.get(f"/v1/videos/{made['id']}/content?file=record").json()
    ticks = client.get(f"/v1/videos/{made['id']}/ticks").json()
    assert sum(len(tick["passes"]) for tick in ticks) == len(record["decisions"])
    assert client.delete(f"/v1/videos/{made['id']}").json()["deleted"]
    assert client.get(f"/v1/videos/{made['id']}").status_code == 404
    assert not any(jobs.folder.iterdir())


def test_an_uploaded_picture_is_the_start(pipe: Pipeline, start: Start, client_of: ClientOf):
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    jobs = start()
    made = client_of(jobs).post(
        "/v1/videos",
        data={"prompt": PROMPT, "seed": "3"},
        files={"input_reference": ("../../a.png", buffer.getvalue(), "image/png")},
    )
    job = finished(jobs, made.json()["id"])
    assert job.status == DONE, job.error
    frames, _ = read_video(jobs.path(job, "video.mp4"))
    expected = pipe(PROMPT, seed=3, image=picture).frames
    assert np.abs(frames.astype(float) - expected).mean() < 4  # the codec's noise, of 255
    assert sorted(path.name for path in jobs.folder.glob("*/input*")) == ["input.image"]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        pytest.param({}, 400, "prompt is missing", id="no prompt"),
        pytest.param({"prompt": 3}, 400, "prompt must be text, not 3", id="a number as prompt"),
        pytest.param({"prompt": "x" * 10_001}, 400, "at most 10000", id="a long prompt"),
        pytest.param({"num_frames": 98}, 400, "num_frames must be 4 n + 1", id="odd frames"),
        pytest.param({"num_frames": 10**15}, 400, "num_frames", id="endless frames"),
        pytest.param({"size": "big"}, 400, "size must be WIDTHxHEIGHT", id="size in words"),
        pytest.param({"size": "66x64"}, 400, "must", id="a size that the model cannot make"),
        pytest.param({"seconds": "x"}, 400, "seconds must be a number", id="seconds in words"),
        pytest.param({"seconds": -1}, 400, "seconds must be a number", id="negative seconds"),
        pytest.param({"model": "sora-2"}, 404, "has the model demo", id="another model"),
        pytest.param(
            {"preset": "/etc/x.yaml"}, 400, "preset '/etc/x.yaml' is unknown", id="a file"
        ),
        pytest.param({"image": "/etc/passwd"}, 400, "'image' is unknown", id="a path"),
        pytest.param({"embedding_cache": "/tmp"}, 400, "is unknown; known", id="a folder"),
        pytest.param({"device": "cuda"}, 400, "is unknown; known", id="a device"),
        pytest.param({"reuse": {"profile": "x"}}, 400, "is unknown; known", id="a section"),
        pytest.param({"seed": {"a": 1}}, 400, "must be a number or a text", id="an object"),
        pytest.param({"seed": "x\n\x1b[0m"}, 400, "seed", id="control characters"),
    ],
)
def test_a_wrong_field_is_a_line_and_leaves_nothing(
    fields: dict[str, Any], status: int, message: str, start: Start, client_of: ClientOf
):
    jobs = start()
    given = {"prompt": PROMPT, **fields} if fields else {}
    answer = client_of(jobs).post("/v1/videos", json=given)
    assert answer.status_code == status
    found = answer.json()["error"]["message"]
    assert message in found
    assert found.isprintable()
    assert not any(jobs.folder.iterdir())


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b"[]", "application/json", 400, "must be a JSON object"),
        (b"[" * 100_000, "application/json", 400, "not valid JSON"),
        (b"x", "text/plain", 415, "send JSON or a form"),
        (b"x" * 2_000_000, "application/json", 413, "at most 1 MB"),
    ],
)
def test_an_odd_body_is_refused(
    content: bytes, kind: str, status: int, message: str, start: Start, client_of: ClientOf
):
    client = client_of(start())
    answer = client.post("/v1/videos", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_an_upload_that_is_no_picture_is_refused(start: Start, client_of: ClientOf):
    jobs = start()
    upload = {"input_reference": ("a.png", b"no picture", "image/png")}
    answer = client_of(jobs).post("/v1/videos", data={"prompt": PROMPT}, files=upload)
    assert answer.status_code == 400
    assert not any(jobs.folder.iterdir())


def test_a_full_queue_and_a_full_disk_are_said(start: Start, client_of: ClientOf):
    jobs = start(max_waiting=1)
    client = client_of(jobs)
    first = client.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 97}).json()
    second = client.post("/v1/videos", json={"prompt": PROMPT})
    assert second.status_code == 429
    assert "1 jobs wait already" in second.json()["error"]["message"]
    client.post(f"/v1/videos/{first['id']}/cancel")
    finished(jobs, first["id"])
    jobs.max_bytes = 1
    assert client.post("/v1/videos", json={"prompt": PROMPT}).status_code == 507


def test_a_cancelled_video_ends_early_and_the_next_is_made(start: Start, client_of: ClientOf):
    jobs = start()
    client = client_of(jobs)
    ids = [
        client.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 177}).json()["id"]
        for _ in range(2)
    ]
    waiting = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    assert jobs.wait(lambda: len(jobs.jobs[ids[0]].ticks) > 2, timeout_seconds=60)
    for video_id in ids:  # one at work, one in the queue
        client.post(f"/v1/videos/{video_id}/cancel")
        job = finished(jobs, video_id)
        assert job.status == CANCELLED
        assert len(job.ticks) < job.num_ticks
    assert client.get(f"/v1/videos/{ids[0]}/content").status_code == 409
    assert finished(jobs, waiting).status == DONE


def test_finished_videos_outlive_the_service_and_others_are_marked(
    start: Start, client_of: ClientOf
):
    jobs = start()
    client = client_of(jobs)
    done = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    finished(jobs, done)
    lost = client.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 177}).json()["id"]
    assert jobs.wait(lambda: len(jobs.jobs[lost].ticks) > 0, timeout_seconds=60)
    state = json.loads(jobs.path(jobs.jobs[lost], "job.json").read_text())  # as a kill leaves it
    jobs.close()
    jobs.path(jobs.jobs[lost], "job.json").write_text(json.dumps(state))
    (jobs.folder / "stray").mkdir()
    (jobs.folder / "stray" / "job.json").write_text("{}")
    again = client_of(start())
    listed = {video["id"]: video for video in again.get("/v1/videos").json()["data"]}
    assert listed.keys() == {done, lost}
    assert listed[done]["status"] == DONE
    assert listed[lost]["status"] == FAILED
    assert "ended before the video was done" in listed[lost]["error"]["message"]
    assert again.get(f"/v1/videos/{done}/content").status_code == 200


def test_a_service_with_a_token_answers_nobody_else(start: Start, client_of: ClientOf):
    client = client_of(start(), token="secret")
    assert client.get("/health").status_code == 200
    assert client.get("/v1/videos").status_code == 401
    assert client.get("/v1/videos", headers={"authorization": "Bearer no"}).status_code == 401
    right = {"authorization": "Bearer secret"}
    assert client.get("/v1/videos", headers=right).status_code == 200
    assert client.get("/v1/videos?token=secret").status_code == 200
    assert client.get("/v1/videos").status_code == 200  # by the cookie that was set


def test_a_name_that_is_not_of_this_machine_is_refused(start: Start, client_of: ClientOf):
    answer = client_of(start()).get("/v1/videos", headers={"host": "elsewhere.example"})
    assert answer.status_code == 400


def test_metrics_count_videos_and_first_chunks(start: Start, client_of: ClientOf):
    jobs = start()
    client = client_of(jobs)
    finished(jobs, client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"])
    lines = client.get("/metrics").text.splitlines()
    assert 'flowcache_videos{status="completed"} 1.0' in lines
    assert "flowcache_first_part_seconds_count 1.0" in lines
    assert "flowcache_video_frames_sum 33.0" in lines


@pytest.mark.parametrize("folder", ["SkyReels-V2", "MAGI-1", "Self-Forcing"])
def test_the_launcher_hands_its_variables_to_the_service(folder: str):
    launcher = Path(__file__).resolve().parents[2] / f"FlowCache4{folder}" / "serve.sh"
    command = ["bash", str(launcher), "num_frames"]
    environment = {**os.environ, "MODEL": "demo", "PORT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--port must be between 1 and 65535, not 0" in done.stderr


def test_fifty_clients_lose_and_mix_nothing(pipe: Pipeline, start: Start, client_of: ClientOf):
    jobs = start(max_waiting=50)
    client = client_of(jobs)

    def ask(number: int) -> tuple[int, str]:
        fields = {"prompt": PROMPT, "seed": number % 5, "num_frames": 17, "num_steps": 4}
        return number, client.post("/v1/videos", json=fields).json()["id"]

    with ThreadPoolExecutor(50) as pool:
        made = dict(pool.map(ask, range(50)))
    assert len(set(made.values())) == 50
    expected = [pipe(PROMPT, seed=seed, num_frames=17, num_steps=4).frames for seed in range(5)]
    for number, video_id in made.items():
        job = finished(jobs, video_id)
        assert job.status == DONE, job.error
        frames, _ = read_video(jobs.path(job, "video.mp4"))
        near = [np.abs(frames.astype(float) - clip).mean() for clip in expected]
        assert np.argmin(near) == number % 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_client_of_openai_gets_a_video(service: Callable[..., str], tmp_path: Path):
    address = service("num_frames=33", "num_steps=8")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
    video = client.videos.create(model="demo", prompt=PROMPT, seconds="4", size="64x64")  # type: ignore[arg-type]
    video = client.videos.poll(video.id, poll_interval_ms=100)
    assert video.status == "completed"
    client.videos.download_content(video.id).write_to_file(tmp_path / "a.mp4")
    frames, _ = read_video(tmp_path / "a.mp4")
    assert len(frames) == 97
    assert [each.id for each in client.videos.list()] == [video.id]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.BadRequestError, match="prompt is empty"):
        client.videos.create(model="demo", prompt=" ")
