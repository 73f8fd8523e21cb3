"""The memory plan against what a run really holds.

Measured are the tensors that a whole run of the pipeline makes, and the weights. At the released
size that is done on the meta device, where every tensor has its size but no values; at a small size
on the CPU with real values.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.config import find_preset, load_config
from flowcache.runtime.memory import (
    LeanAttention,
    LiveBytes,
    MemoryPlan,
    Networks,
    Residence,
    make_memory_plan,
)
from flowcache.runtime.model import Request
from flowcache.runtime.run import encode_inputs, load_networks, plan_by_sizes, prepare
from flowcache.runtime.stats import RunStats
from flowcache.wan import vae
from flowcache.wan.dit import DiT, DiTConfig
from flowcache.wan.text import empty_encoder
from skyreels_v2.checkpoint import released_sizes
from skyreels_v2.config import RunConfig
from skyreels_v2.memory import WindowMemory, networks_of
from skyreels_v2.model import MODEL
from skyreels_v2.pipeline import Conditioning, generate
from skyreels_v2.released import PRESETS
from skyreels_v2.work import work_of

META = torch.device("meta")
SIZES = released_sizes("df-1.3b-540p")
STEPS = ("num_steps=3", "ar_step=0", "seed=1")
"""Few ticks, all chunks active at once: what is held does not depend on their number."""
TOLERANCE = 0.15


def config_of(preset: str, *settings: str) -> RunConfig:
    layers = [PRESETS / "base.yaml", find_preset(PRESETS, preset)]
    return load_config(RunConfig, layers, overrides=["prompt=a swan", *STEPS, *settings])


def planned(
    config: RunConfig, sizes: DiTConfig, networks: Networks, *, dtype: torch.dtype
) -> MemoryPlan:
    plan = work_of(config, sizes, dtype=dtype)
    needs = WindowMemory(sizes, config, plan, networks=networks, dtype=dtype)
    return make_memory_plan(needs.stages, wanted=Residence(), limit_bytes=None, has_host=True)


def generation_peak(plan: MemoryPlan) -> int:
    """The plan's peak without the text encoder, which is gone by then."""
    return max(stage.peak_bytes for stage in plan.stages if stage.name != "text")


def weights(*models: torch.nn.Module) -> int:
    return sum(p.nbytes for model in models for p in model.parameters())


def measured(
    config: RunConfig, dit: DiT, codec: vae.VAE, text: dict[str, Tensor], **options: Any
) -> int:
    """Return the most bytes that the run held at once."""
    device = next(dit.parameters()).device
    stats = RunStats(torch.device("cpu"))
    conditioning, work = Conditioning(text), work_of(config, dit.config, dtype=dit.dtype)
    if device == META:
        options["draw"] = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=META)
    with LeanAttention(), LiveBytes() as live:
        for _ in generate(dit, codec, config, conditioning, stats=stats, work=work, **options):
            pass
    return live.peak + weights(dit, codec.model)


def at_released_size(config: RunConfig) -> int:
    with META:
        dit = DiT(SIZES).to(torch.bfloat16)
    text = {
        name: torch.empty(1, 512, 4096, dtype=torch.bfloat16, device=META)
        for name in ("cond", "uncond")
    }
    return measured(config, dit, vae.released(), text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("vanilla_causal", ()),
        ("vanilla", ()),
        ("stride", ("attention=causal", "kv.compress=recent")),
    ],
)
def test_the_plan_of_the_released_size_holds(preset: str, settings: tuple[str, ...]):
    config = config_of(preset, "num_frames=97", "reuse.warmup_steps=1", *settings)
    networks = networks_of(None, SIZES, dtype=torch.bfloat16)
    plan = planned(config, SIZES, networks, dtype=torch.bfloat16)
    assert generation_peak(plan) == pytest.approx(at_released_size(config), rel=TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        ("attention=full",),
        ("attention=causal",),
        ("attention=causal", "batch_branches=true"),
        ("attention=causal", "kv.compress=importance", "kv.budget_chunks=1"),
        ("attention=causal", "reuse.policy=stride", "reuse.warmup_steps=1"),
    ],
)
def test_the_plan_of_a_run_on_the_cpu_holds(small: Path, settings: tuple[str, ...]):
    sizes = ("height=96", "width=128", "num_frames=33", "base_num_frames=33")
    overrides = ["prompt=a swan", *sizes, *STEPS, *settings]
    job = prepare(
        MODEL, Request(preset="vanilla", model=str(small), overrides=overrides, is_dry=True)
    )
    assert job.memory is not None
    models = load_networks(job, stats=RunStats(job.device))
    text = encode_inputs(job, stats=RunStats(job.device)).text
    peak = measured(job.config, models.dit, models.vae, dict(text))
    assert generation_peak(job.memory) == pytest.approx(peak, rel=TOLERANCE)


def test_a_limit_moves_the_keys_and_is_told():
    request = Request(
        preset="flowcache_fast",
        model="df-1.3b-540p",
        overrides=["prompt=x", "num_frames=97", "memory_limit=24GB"],
    )
    said = plan_by_sizes(MODEL, request)
    assert "limit 24 GB: keys and values lie on the host" in said
    for stage in ("text", "denoise", "decode"):
        assert f"\n  {stage}" in said


def test_a_run_that_cannot_fit_ends_before_anything_is_loaded(small: Path):
    overrides = ["prompt=a swan", "memory_limit=1MB"]
    with pytest.raises(UserError, match=r"memory_limit is 1 MB.* needs .*most of it"):
        prepare(MODEL, Request(preset="vanilla", model=str(small), overrides=overrides))


def test_settings_are_placed_as_planned():
    config = config_of("vanilla_causal")
    moved = MODEL.placed(config, Residence(text_on_host=True, dit_aside=True, kv_on_host=True))
    assert (moved.text_on_host, moved.offload, moved.kv_on_host) == (True, True, True)


def test_the_text_encoder_is_counted_at_its_size(small: Path):
    encoder = empty_encoder(small / "text_encoder")
    stored = sum(p.numel() for p in encoder.parameters())
    job = prepare(
        MODEL, Request(preset="vanilla", model=str(small), overrides=["prompt=a"], is_dry=True)
    )
    assert job.memory is not None
    assert job.memory.stages[0].parts[0].num_bytes == 4 * stored
