"""The memory plan against what a run really holds.

Measured are the tensors that a whole run of the pipeline makes, and the weights. At the released
picture size that is done on the meta device, where every tensor has its size but no values; at
small sizes on the CPU with real values.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowcache.errors import UserError
from flowcache.runtime.memory import (
    LeanAttention,
    LiveBytes,
    MemoryPlan,
    Networks,
    make_memory_plan,
    scratch_bytes,
)
from flowcache.runtime.model import Request
from flowcache.runtime.run import encode_inputs, load_networks, plan_by_sizes, prepare
from flowcache.runtime.stats import RunStats
from magi1 import vae
from magi1.config import RunConfig
from magi1.dit import DiT, set_precision
from magi1.memory import ClipMemory, TracedVAE
from magi1.model import MODEL
from magi1.pipeline import Conditioning, generate_clip
from magi1.text import NULL_TOKENS, empty
from magi1.vae import ViTVAE
from magi1.work import clip_work

META = torch.device("meta")
TOLERANCE = 0.15
STEPS = ("runtime_config.num_steps=4",)
"""Few ticks, all chunks active at once: what is held does not depend on their number."""


def size(height: int, width: int, num_frames: int) -> tuple[str, ...]:
    return (
        f"runtime_config.video_size_h={height}",
        f"runtime_config.video_size_w={width}",
        f"runtime_config.num_frames={num_frames}",
    )


def generation_peak(plan: MemoryPlan) -> int:
    """The plan's peak without the text encoder, which is gone by then."""
    return max(stage.peak_bytes for stage in plan.stages if stage.name != "text")


def measured(
    config: RunConfig, dit: DiT, codec: vae.VAE, inputs: Conditioning, **options: Any
) -> int:
    """Return the most bytes that the run held at once."""
    stats = RunStats(torch.device("cpu"))
    with LeanAttention(), LiveBytes() as live:
        for _ in generate_clip(dit, codec, config, inputs, stats=stats, **options):
            pass
    weights = (*dit.parameters(), *codec.model.parameters())
    return live.peak + sum(parameter.nbytes for parameter in weights)


def planned_and_measured_at_released_size(
    config: RunConfig, text_encoder: Path
) -> tuple[MemoryPlan, int]:
    """Plan and run a few layers of the released model: scratch memory is that of one layer."""
    model = replace(config.model_config, num_layers=4)
    config = replace(config, model_config=model)
    with META:
        dit = DiT(model)
        networks = vae.ViTVAE(replace(vae.RELEASED, depth=1)).to(torch.bfloat16)
    set_precision(dit, torch.bfloat16)
    codec = vae.VAE(networks, scale=config.runtime_config.scale_factor)
    plan = clip_work(
        config, num_prefix=0, prompt_tokens=50, has_special_tokens=False, dtype=torch.bfloat16
    )
    needs = ClipMemory(
        config,
        plan,
        networks=Networks(empty(text_encoder), torch.float32, codec),
        dtype=torch.bfloat16,
    )
    peak = measured(
        config,
        dit,
        codec,
        Conditioning(torch.empty(NULL_TOKENS, model.caption_channels, device=META)),
        draw=lambda shape, dtype: torch.empty(shape, dtype=dtype, device=META),
        work=plan,
    )
    wanted = MODEL.residence(config)
    return make_memory_plan(needs.stages, wanted=wanted, limit_bytes=None, has_host=True), peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("4.5B_distill", size(720, 720, 96)),
        ("4.5B_base", size(480, 480, 96)),
        (
            "4.5B_distill",
            (*size(720, 720, 144), "kv.compress=importance", "kv.total_chunks=5"),
        ),
        (
            "4.5B_distill",
            (*size(720, 720, 96), "reuse.policy=stride", "reuse.warmup_steps=1"),
        ),
    ],
)
def test_the_plan_of_the_released_size_holds(
    configure: Any, distilled: Path, model: str, settings: tuple[str, ...]
):
    config = configure("vanilla", *STEPS, *settings, model=model)
    plan, peak = planned_and_measured_at_released_size(config, distilled / "ckpt/t5/t5-v1_1-xxl")
    parts = {p.name: p.num_bytes for stage in plan.stages for p in stage.parts}
    # all three matter: none of them is small beside what the tolerance forgives
    for name in ("the transformer", "the KV cache", "activations"):
        assert parts[name] > TOLERANCE * peak
    assert generation_peak(plan) == pytest.approx(peak, rel=TOLERANCE)


def planned_and_measured(
    folder: Path, *settings: str, num_frames: int = 48
) -> tuple[MemoryPlan, int]:
    overrides = ["prompt=a cat", *size(96, 128, num_frames), *STEPS, *settings]
    job = prepare(
        MODEL, Request(preset="vanilla", model=str(folder), overrides=overrides, is_dry=True)
    )
    assert job.memory is not None
    models = load_networks(job, stats=RunStats(job.device))
    inputs = encode_inputs(job, stats=RunStats(job.device))
    assert isinstance(models.vae, vae.VAE)
    return job.memory, measured(job.placed, models.dit, models.vae, inputs, work=job.work)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("kv.compress=importance", "kv.total_chunks=3"),
        ("reuse.policy=stride", "reuse.warmup_steps=1"),
    ],
)
def test_the_plan_of_a_run_on_the_cpu_holds(distilled: Path, settings: tuple[str, ...]):
    plan, peak = planned_and_measured(distilled, *settings)
    assert generation_peak(plan) == pytest.approx(peak, rel=TOLERANCE)


def test_the_plan_with_guidance_on_the_cpu_holds(base: Path):
    plan, peak = planned_and_measured(base)
    assert generation_peak(plan) == pytest.approx(peak, rel=TOLERANCE)


def test_two_layers_of_keys_on_the_host_are_on_the_device(distilled: Path):
    here, _ = planned_and_measured(distilled, num_frames=240)
    there, peak = planned_and_measured(distilled, "engine_config.kv_offload=true", num_frames=240)
    kv = next(p.num_bytes for p in here.stages[1].parts if p.name == "the KV cache")
    read = next(p for p in there.stages[1].parts if p.name == "2 layers of the KV cache")
    assert read.num_bytes == kv  # the model has two layers
    # on the CPU what would be on the host is counted among the tensors
    assert generation_peak(there) + kv == pytest.approx(peak, rel=TOLERANCE)


def test_a_limit_picks_what_leaves_the_gpu():
    said = plan_by_sizes(
        MODEL,
        Request(
            preset="flowcache_fast",
            model="4.5B_distill",
            overrides=["prompt=x", "memory_limit=16GB", "runtime_config.t5_device=cuda"],
        ),
    )
    assert "limit 16 GB" in said
    assert "the text encoder runs on the host" in said  # 19 GB
    assert "keys and values lie on the host" in said


def test_a_run_that_cannot_fit_ends_before_anything_is_loaded():
    overrides = ["prompt=x", "memory_limit=8GB"]
    request = Request(preset="flowcache_fast", model="4.5B_distill", overrides=overrides)
    with pytest.raises(UserError, match=r"8 GB.* is the transformer: use a smaller model"):
        plan_by_sizes(MODEL, request)


def test_settings_are_placed_as_planned(distilled: Path):
    overrides = ["prompt=a", "offload=true", "engine_config.kv_offload=true"]
    job = prepare(MODEL, Request(preset="vanilla", model=str(distilled), overrides=overrides))
    wanted = MODEL.residence(job.config)
    assert (wanted.dit_aside, wanted.kv_on_host) == (True, True)
    assert MODEL.residence(MODEL.placed(job.config, wanted)) == wanted


@pytest.mark.parametrize("size", [(6, 90, 60), (7, 64, 40), (1, 50, 70), (4, 33, 57)])
def test_alike_tiles_are_traced_once_with_the_same_result(size: tuple[int, int, int]):
    tiling = vae.Tiling.of_rate(24)
    released = vae.empty(None, scale=1.0, tiling=tiling, dtype=torch.float32)
    with torch.device("meta"):
        model = ViTVAE(replace(released.model.config, depth=1))
    latents = torch.empty(1, 16, *size, device="meta")
    slow, fast = vae.VAE(model, scale=1.0), TracedVAE(model, scale=1.0)
    assert scratch_bytes(lambda: fast.decode(latents)) == scratch_bytes(
        lambda: slow.decode(latents)
    )
