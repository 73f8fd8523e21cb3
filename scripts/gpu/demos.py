"""The demo checkpoints, opened without what only files, prompts or the hub need."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowcache.attention import AttentionShape
from flowcache.runtime.model import Progress, Request
from flowcache.runtime.run import read_settings
from flowcache.runtime.stats import RunStats
from gpu.subject import is_installed

Play = Callable[[Any, Any, Any, RunStats, Any], Iterator[Progress]]
"""`(transformer, VAE, settings, statistics, noise) -> what is shown`"""
CERTAIN = ("reuse.warmup_steps=1", "reuse.threshold=100")
"""Every step between the forced ones is reused, whichever way signals are rounded."""
NUM_WORDS = 12
"""Tokens of the made-up prompt of MAGI-1, whose prompts are as long as they are."""


@dataclass(frozen=True)
class Demo:
    """What a check needs of a model.

    Attributes:
        fast: preset that reuses; vanilla: one that does not; compressed: one that compresses.
        steps_key: setting of the number of steps.
        keys_on_host: setting that keeps keys and values there.
        read: `(preset, more settings, dtype)`: all settings.
        load: `(settings, dtype, device)`: the transformer.
        load_vae: `(settings, device)`: the VAE, in float32.
        play: runs it.
        attention: the largest self-attention of a transformer; num_text: tokens of its prompt.
    """

    title: str
    fast: str
    vanilla: str
    compressed: str
    steps_key: str
    keys_on_host: tuple[str, ...]
    read: Callable[[str, Sequence[str], torch.dtype], Any]
    load: Callable[[Any, torch.dtype, torch.device], Any]
    load_vae: Callable[[Any, torch.device], Any]
    compiled_parts: Callable[[], Any]
    play: Play
    attention: Callable[[Any], AttentionShape]
    num_text: Callable[[Any], int]
    vae_package: str | None = None

    @property
    def has_vae(self) -> bool:
        """Whether what the VAE needs is installed."""
        return self.vae_package is None or is_installed(self.vae_package)


def _name(dtype: torch.dtype) -> str:
    return f"dtype={str(dtype).removeprefix('torch.')}"


def _words(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def skyreels() -> Demo:
    """Return SkyReels-V2."""
    from flowcache.wan import vae
    from flowcache.wan.dit import compiled_parts
    from skyreels_v2 import checkpoint
    from skyreels_v2.model import MODEL
    from skyreels_v2.pipeline import Conditioning, generate
    from skyreels_v2.work import branches_of

    source = MODEL.find("demo")
    found = source.files
    # three chunks of 80 tokens in one window
    short = ("num_frames=57", "base_num_frames=57", "overlap_history=null")

    def read(preset: str, settings: Sequence[str], dtype: torch.dtype) -> Any:
        overrides = ("prompt=-", "ar_step=2", *short, *CERTAIN, _name(dtype), *settings)
        return read_settings(MODEL, Request(preset, overrides=overrides), source)

    def load(_config: Any, dtype: torch.dtype, device: torch.device) -> Any:
        return checkpoint.load_dit(found, dtype=dtype, device=device)

    def play(dit: Any, codec: Any, config: Any, stats: RunStats, draw: Any) -> Iterator[Progress]:
        names, sizes = branches_of(config), dit.config
        text = {n: _words(1, sizes.text_len, sizes.text_dim) * (1 + i) for i, n in enumerate(names)}
        inputs = Conditioning(text)
        return generate(dit, codec, config, inputs, stats=stats, draw=draw)

    def attention(dit: Any) -> AttentionShape:
        heads = dit.config.num_heads
        return AttentionShape(80, 240, heads, heads, dit.config.head_width)

    return Demo(
        title="SkyReels-V2",
        fast="flowcache_fast",
        vanilla="vanilla",
        compressed="flowcache_kvcompress",
        steps_key="num_steps",
        keys_on_host=("kv_on_host=true",),
        read=read,
        load=load,
        load_vae=lambda _config, device: vae.load(found.vae, device=device),
        compiled_parts=compiled_parts,
        play=play,
        attention=attention,
        num_text=lambda dit: dit.config.text_len,
        vae_package="diffusers",
    )


def magi1() -> Demo:
    """Return MAGI-1."""
    from magi1 import vae
    from magi1.checkpoint import Checkpoint
    from magi1.dit import compiled_parts
    from magi1.model import MODEL
    from magi1.pipeline import Conditioning, generate_clip

    # six chunks of 96 tokens: one more than the compressed cache holds
    short = ("runtime_config.num_frames=144", "engine_config.kv_offload=false")

    def read(preset: str, settings: Sequence[str], dtype: torch.dtype) -> Any:
        overrides = ("prompt=-", *short, *CERTAIN, _name(dtype), *settings)
        return read_settings(MODEL, Request(preset, "demo", overrides))

    def load(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
        return Checkpoint.find(config).load_dit(device=device, dtype=dtype)

    def load_vae(config: Any, device: torch.device) -> Any:
        folder, scale = Path(config.runtime_config.vae_pretrained), run_scale(config)
        return vae.load(folder, scale=scale, dtype=torch.float32, device=device)

    def run_scale(config: Any) -> float:
        return config.runtime_config.scale_factor

    def play(dit: Any, codec: Any, config: Any, stats: RunStats, draw: Any) -> Iterator[Progress]:
        inputs = Conditioning(_words(NUM_WORDS, dit.config.caption_channels))
        return generate_clip(dit, codec, config, inputs, stats=stats, draw=draw)

    def attention(dit: Any) -> AttentionShape:
        sizes = dit.config
        return AttentionShape(
            96, 480, sizes.num_attention_heads, sizes.num_query_groups, sizes.kv_channels
        )

    return Demo(
        title="MAGI-1",
        fast="flowcache_fast_nocompress",
        vanilla="vanilla",
        compressed="flowcache_fast",
        steps_key="runtime_config.num_steps",
        keys_on_host=("engine_config.kv_offload=true",),
        read=read,
        load=load,
        load_vae=load_vae,
        compiled_parts=compiled_parts,
        play=play,
        attention=attention,
        num_text=lambda _dit: NUM_WORDS,
    )


DEMOS: Mapping[str, Callable[[], Demo]] = {"skyreels_v2": skyreels, "magi1": magi1}
"""Opens each."""
