"""Windows that SkyReels-V2's sampler denoises with small random transformers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowcache.compress import CompressionStrategy, Recent, TokenLayout
from flowcache.kv import Compression, caches_for
from flowcache.policies import ReusePolicy, Vanilla
from flowcache.predict import HeldGuidance, Quantity, ResultStore
from flowcache.runtime.stats import RunStats
from flowcache.tokens import TokenChoice
from flowcache.wan.dit import DiT
from skyreels_v2.sampler import Branch, Run, Sampling, WindowSampler
from skyreels_v2.window import Window, cut_window

HEIGHT, WIDTH, FRAME_TOKENS = 4, 6, 6
FULL = Sampling(6, 8.0, 3.0, 2, "full", clean_pass=False, fps=24)
CAUSAL = replace(FULL, attention="causal")
CLEAN = replace(CAUSAL, clean_pass=True)
LOOPS = {"full": FULL, "causal": CAUSAL, "causal with clean pass": CLEAN}
QUANTITIES: tuple[Quantity, ...] = ("residual", "velocity", "latent_update", "clean")
WINDOW = cut_window(5, chunk_frames=2)
"""Three chunks, the last one shorter."""


def noise(num_frames: int = 5, *, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(16, num_frames, HEIGHT, WIDTH, generator=draw)


def prompts(dit: DiT, *, seed: int = 2) -> dict[str, Tensor]:
    draw, config = torch.Generator().manual_seed(seed), dit.config
    shape = (1, config.text_len, config.text_dim)
    return {name: torch.randn(*shape, generator=draw) for name in ("cond", "uncond")}


def kept(strategy: CompressionStrategy | None = None, *, chunks: int = 1) -> Compression:
    """Return a budget of some chunks of two frames; the strategy is the most recent ones."""
    layout = TokenLayout(FRAME_TOKENS, 2 * FRAME_TOKENS)
    budget = chunks * layout.chunk_tokens
    return Compression(budget, partial((strategy or Recent()).keep, budget=budget, layout=layout))


@dataclass
class Denoised:
    """What came out of denoising a window."""

    rows: list[Tensor]
    stats: RunStats
    branches: dict[str, Branch]
    updates: ResultStore

    @property
    def latents(self) -> Tensor:
        return self.rows[-1]


def denoise(
    dit: DiT,
    latents: Tensor | None = None,
    *,
    window: Window = WINDOW,
    sampling: Sampling = CAUSAL,
    policy: Callable[[], ReusePolicy] = Vanilla,
    policies: dict[str, ReusePolicy] | None = None,
    texts: dict[str, Tensor] | None = None,
    seed: int = 2,
    condition: Tensor | None = None,
    image: Tensor | None = None,
    records: bool = False,
    storage: torch.device | None = None,
    store: Callable[[], ResultStore] = ResultStore,
    guidance: HeldGuidance | None = None,
    tokens: Callable[[], TokenChoice] | None = None,
    **options: Any,
) -> Denoised:
    """Denoise a window with random prompts, or the given ones.

    Args:
        options: of `Run`; a compression counts only where there is a cache.
    """
    config, moving = dit.config, (noise() if latents is None else latents).clone()
    texts = texts or prompts(dit, seed=seed)
    names = ("cond", "uncond") if sampling.guidance > 1 else ("cond",)
    branches = {
        name: Branch(
            dit.encode_context(texts[name], image),
            policy() if policies is None else policies[name],
            store(),
            caches_for(
                config.num_layers if sampling.attention == "causal" else 0,
                capacity=window.num_frames * moving.shape[-2] * moving.shape[-1] // 4,
                num_heads=config.num_heads,
                head_width=config.head_width,
                dtype=dit.dtype,
                device=moving.device,
                storage=storage,
            ),
            None if tokens is None else tokens(),
        )
        for name in names
    }
    stats = RunStats(moving.device, records=records)
    if sampling.attention == "full":
        options.pop("compression", None)
    run = Run(
        dit,
        sampling,
        stats,
        new_store=store,
        new_guidance=lambda: guidance or HeldGuidance(),
        **options,
    )
    sampler = WindowSampler(run, moving, window=window, branches=branches, condition=condition)
    rows = [moving.clone() for _ in sampler.denoise()]
    return Denoised(rows, stats, branches, sampler.reuse.updates)
