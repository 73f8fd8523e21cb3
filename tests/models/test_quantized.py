"""Runs whose keys and values are quantised."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.errors import UserError
from flowcache.kv_quantized import QuantizedKVCache
from flowcache.runtime.run import prepare
from flowcache.runtime.video import read_video

pytestmark = pytest.mark.numeric

INT4 = ("kv.dtype=int4", "kv.quantizer=kmeans", "kv.bias_correction=true", "kv.group_size=4")
BUDGET = {"skyreels_v2": (), "magi1": ("kv.total_chunks=3",)}
KINDS = [
    (),
    ("kv.compress=importance", "kv.kernel=3"),
    ("kv.compress=window",),
    ("kv.compress=recent",),
    ("kv.compress=sink_recent",),
    ("kv.compress=deep_forcing", "kv.recent_frames=1"),
]


def start(tiny: Any, out: Path, *rest: str, preset: str | None = None) -> Any:
    """Make a video with the command line and return its frames."""
    given = ["--preset", preset or tiny.short.causal, "--model", str(tiny.folder)]
    given += ["--prompt", "a red circle moving right", "--out", str(out), *tiny.short.long]
    assert tiny.main(*given, *rest) == 0
    return read_video(out)[0].astype(float)


def test_the_dtype_of_the_model_is_the_run_without_quantisation_bit_by_bit(
    tiny: Any, tmp_path: Path
):
    plain = start(tiny, tmp_path / "plain.mp4")
    # other settings of quantisation say nothing then
    same = start(tiny, tmp_path / "same.mp4", *INT4[1:], "kv.dtype=model", "kv.keep_last=true")
    assert np.array_equal(plain, same)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "".join(kind[:1]))
def test_fewer_bits_are_further_from_sixteen(tiny: Any, tmp_path: Path, kind: Sequence[str]):
    kept = (*kind, *BUDGET[tiny.model.name]) if kind else ()
    plain = start(tiny, tmp_path / "plain.mp4", *kept)
    eight, two = (
        start(tiny, tmp_path / f"{dtype}.mp4", f"kv.dtype={dtype}", "kv.group_size=4", *kept)
        for dtype in ("int8", "int2")
    )
    near, far = (np.abs(frames - plain).mean() for frames in (eight, two))
    # the video's compression adds to both
    assert 0 < near < 0.9 * far


def test_keys_on_the_host_change_nothing(tiny: Any, tmp_path: Path):
    here, there = (
        start(tiny, tmp_path / f"{place}.mp4", *INT4, *place)
        for place in ((), (tiny.short.kv_on_host,))
    )
    assert np.array_equal(here, there)


def test_a_record_of_quantised_keys_is_replayed_bit_by_bit(tiny: Any, tmp_path: Path):
    reuse = ("reuse.policy=flowcache", "reuse.warmup_steps=1", "reuse.threshold=0.05")
    settings = (*INT4, *reuse, *KINDS[1], *BUDGET[tiny.model.name], "kv.keep_last=true")
    first = start(tiny, tmp_path / "first.mp4", "--record", *settings)
    replay = ("--replay", str(tmp_path / "first.record.json"))
    assert np.array_equal(start(tiny, tmp_path / "again.mp4", *settings, *replay), first)
    record = json.loads((tmp_path / "first.record.json").read_text())
    assert record["kv"], "the tokens of quantised caches are recorded, too"


def test_the_plan_counts_the_bytes_of_a_full_cache(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = [*INT4, "kv.keep_last=true"]
    caches: list[QuantizedKVCache] = []
    made = QuantizedKVCache.__init__

    def noted(self: QuantizedKVCache, *rest: Any, **options: Any) -> None:
        caches.append(self)
        made(self, *rest, **options)

    monkeypatch.setattr(QuantizedKVCache, "__init__", noted)
    start(tiny, tmp_path / "a.mp4", *settings)
    request = tiny.request(*settings, *tiny.short.long, preset=tiny.short.causal, out="b.mp4")
    job = prepare(tiny.model, request)
    shape, held = job.work.attention, dict[int, int]()
    for cache in caches:
        sizes, made = cache.layout.sizes, cache.layout.made
        table = sum(
            made.table_bytes(sizes.chunk_tokens, shape.head_width, is_key=is_key)
            for is_key in (True, False)
        )
        # the last chunk of a video, and those that stay as they are, have no table yet
        missing = (sizes.num_chunks - len(cache.tables[0].base)) * table * shape.kv_heads
        segment = id(cache.layout)
        held[segment] = held.get(segment, 0) + cache.num_bytes() + missing
    assert job.work.kv_bytes == max(held.values())
    layer = caches[-1].layer.kv.nbytes
    assert layer < job.work.kv_read_bytes < layer + 2**20


WRONG = [
    ("kv.dtype=int3", "kv.dtype is 'int3', but must be one of model"),
    ("kv.group_size=5", "divides the head width"),
    ("kv.stages=9", "kv.stages must be in 1..8, not 9"),
]


@pytest.mark.parametrize(("setting", "line"), WRONG)
def test_what_can_not_be_quantised_is_refused_in_a_line(tiny: Any, setting: str, line: str):
    with pytest.raises(UserError) as error:
        prepare(tiny.model, tiny.request("kv.dtype=int4", setting, preset=tiny.short.causal))
    assert line.split(",")[0] in str(error.value)
    assert "\n" not in str(error.value)
