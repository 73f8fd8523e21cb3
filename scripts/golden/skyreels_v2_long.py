"""The reference cases of SkyReels-V2 that make a long video of two or more segments."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowcache.kv import KVCache
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import DiT
from golden.case import Case, Check, compare, compare_sets, known
from golden.skyreels_v2_loops import (
    LOOP_TOLERANCE,
    Denoised,
    build_dit,
    coefficients_name,
    denoise,
    fork_compression,
    fork_policy,
    fork_sampling,
    fps_of,
    texts_of,
    token_layout,
)
from skyreels_v2.config import KVConfig, ReuseConfig, RunConfig
from skyreels_v2.pipeline import Conditioning, generate
from skyreels_v2.window import cut_window

BYTE_TOLERANCE = 1
STRIDE, FRAMES_PER_LATENT, LATENT_CHANNELS = 8, 4, 16
BLIND = (
    "the fork hides the prefix in the first tick of a segment, ours shows it; equal with the prefix"
    " hidden there"
)
BLIND_WITHOUT_REUSE = BLIND.replace("the first tick of a segment", "every tick")


@dataclass
class StandInVAE:
    """The linear VAE of these cases: averages to encode, repeats to decode; keeps what it saw.

    Pixels are averaged over 8 x 8, and over 4 frames from the second on; latent channel c is colour
    channel c mod 3 times 4 times the c-th of 16 even steps from 0.5 to 1.5. To decode, a quarter of
    the first 3 channels is repeated.
    """

    encoded: list[Tensor] = field(default_factory=list)
    """Latents of every call of `encode`, `[C, F, h, w]`."""
    segments: list["StandInDecoder"] = field(default_factory=list)

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        pooled = functional.avg_pool3d(pixels_B3THW, (1, STRIDE, STRIDE))
        later = pooled[:, :, 1:].unflatten(2, (-1, FRAMES_PER_LATENT)).mean(dim=3)
        latents = torch.cat([pooled[:, :, :1], later], dim=2)
        channels = torch.arange(LATENT_CHANNELS)
        scale = 4 * torch.linspace(0.5, 1.5, LATENT_CHANNELS)
        latents = latents[:, channels % 3] * scale.view(-1, 1, 1, 1)
        self.encoded.append(latents[0])
        return latents

    def stream(self, ranks: Ranks, /) -> "StandInDecoder":
        self.segments.append(StandInDecoder())
        return self.segments[-1]


@dataclass
class StandInDecoder:
    """Decodes one segment."""

    parts: list[Tensor] = field(default_factory=list)

    @property
    def latents(self) -> Tensor:
        """Everything decoded so far, `[C, F, h, w]`."""
        return torch.cat(self.parts, dim=1)

    def decode(self, latents_BCFhw: Tensor, /) -> Tensor:
        frames = (0.25 * latents_BCFhw[:, :3]).clamp(-1, 1).repeat_interleave(STRIDE, dim=-1)
        repeats = torch.full((latents_BCFhw.shape[2],), FRAMES_PER_LATENT)
        if not self.parts:
            repeats[0] = 1
        self.parts.append(latents_BCFhw[0])
        return frames.repeat_interleave(STRIDE, dim=-2).repeat_interleave(repeats, dim=2)


class PrefixBlindCache(KVCache):
    """Hides the clean tokens in the first tick after the given chunk, as the fork does."""

    num_reads = 0

    def prefix(self, offset: int, *, reach_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        k, v = super().prefix(offset, reach_tokens=reach_tokens)
        if offset == 0:  # compression looks at the clean tokens
            return k, v
        self.num_reads += 1
        # the first read is that of the given chunk itself
        return (k[self.clean :], v[self.clean :]) if self.num_reads == 2 else (k, v)


def check_long_video(case: Case) -> Iterator[Check]:
    """Compare whole long videos of upstream and of the published FlowCache."""
    dit = build_dit(case)
    for run in case.settings["runs"]:
        vae, stats = StandInVAE(), RunStats(torch.device("cpu"))
        frames = _make_video(case, run, dit=dit, vae=vae, stats=stats)
        name, stored_frames = run["name"], case.tensor(f"{run['name']}.frames")
        is_compressed = bool(run["budget_block"]) or run["kvrange"] is not None
        # what a segment without the fork's defect has in common with it
        num_equal = 1 if is_compressed else None
        segments = [segment.latents for segment in vae.segments]
        for index, latents in enumerate(segments[:num_equal]):
            stored = case.tensor(f"{name}.seg{index}")
            yield compare(f"{name}.seg{index}", latents, stored, tolerance=LOOP_TOLERANCE)
        for index, prefix in enumerate(vae.encoded[:num_equal], start=1):
            stored = case.tensor(f"{name}.prefix{index}")
            yield compare(f"{name}.prefix{index}", prefix, stored, tolerance=LOOP_TOLERANCE)
        shown = case.settings["args"]["base_num_frames"] if is_compressed else len(stored_frames)
        yield compare(
            f"{name}.frames, first {shown}",
            frames[:shown] if is_compressed else frames,
            stored_frames[:shown],
            tolerance=BYTE_TOLERANCE,
        )
        if run["skipped_own_steps"] is not None:
            yield _check_skipped(run, stats=stats)
        if is_compressed:
            yield from _check_blind(case, run, dit=dit, ours=segments[1])


def _check_skipped(run: dict[str, Any], *, stats: RunStats) -> Check:
    ours = {(p.segment, p.branch, p.chunk, p.step) for p in stats.passes if not p.is_computed}
    skipped = {
        (segment, branch, chunk, step)
        for branch in ("cond", "uncond")
        for segment, chunks in enumerate(run["skipped_own_steps"])
        for chunk, steps in enumerate(chunks)
        for step in steps
    }
    return compare_sets(f"{run['name']}.skipped_own_steps", ours, skipped)


def _check_blind(case: Case, run: dict[str, Any], *, dit: DiT, ours: Tensor) -> Iterator[Check]:
    """Compare the second segment with the fork's defect put into our loop."""
    name, arguments = run["name"], case.settings["args"]
    blind, stored = _blind_segment(case, run, dit=dit), case.tensor(f"{name}.seg1")
    reason = BLIND if run["reuse"] else BLIND_WITHOUT_REUSE
    check = compare(f"{name}.seg1, prefix hidden", blind.latents, stored, tolerance=LOOP_TOLERANCE)
    yield known(check, f"ours differs by {(ours - stored).abs().max().item():.2g}: {reason}")
    start, decoded = arguments["base_num_frames"], StandInDecoder().decode(blind.latents[None])
    check = compare(
        f"{name}.frames from {start}, hidden",
        _to_bytes(decoded[0])[arguments["overlap_pixel_frames"] :],
        case.tensor(f"{name}.frames")[start:],
        tolerance=BYTE_TOLERANCE,
    )
    yield known(check, reason)


def _make_video(
    case: Case, run: dict[str, Any], *, dit: DiT, vae: StandInVAE, stats: RunStats
) -> Tensor:
    """Make a video with our pipeline: every 8th pixel of its frames, uint8 `[T, H/8, W/8, 3]`."""
    config = _run_config(case.settings["args"], run)
    noises = [case.tensor(name) for name in case.names("in.noise.")]
    if config.addnoise_condition:
        drawn = case.tensor(f"{run['name']}.condition_noise")
        # through the KV cache the prefix is noised once, chunk by chunk; else in every tick
        is_causal = config.attention == "causal"
        noises += drawn[0].split(config.causal_block_size, dim=1) if is_causal else drawn
    draws = iter(noises)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        noise = next(draws)
        assert noise.shape == shape, f"noise of {tuple(noise.shape)} stored, {shape} asked for"
        return noise.to(dtype, copy=True)

    texts = texts_of(case, dit.config, guidance=config.guidance)
    progress = generate(dit, vae, config, Conditioning(texts), stats=stats, draw=draw)
    return _to_bytes(torch.cat([p.frames for p in progress if p.frames is not None], dim=1))


def _run_config(arguments: dict[str, Any], run: dict[str, Any]) -> RunConfig:
    is_fork = run["engine"] == "fork"
    is_causal = is_fork or bool(run["causal_mask_block"])
    reuse, kv = ReuseConfig(), KVConfig()
    if run["reuse"]:
        is_ret = run["use_ret_steps"]
        name = coefficients_name(arguments["coefficients"], is_ret=is_ret)
        reuse = ReuseConfig(
            policy="flowcache",
            threshold=run["threshold"],
            warmup_steps=5 if is_ret else 1,
            rescale=name,
        )
    if run["budget_block"]:
        kv = KVConfig(compress="importance", budget_chunks=run["budget_block"], order="score")
    elif run["kvrange"] is not None:
        kv = KVConfig(compress="recent", budget_chunks=run["kvrange"])
    return RunConfig(
        prompt="given as its encoding",
        height=arguments["height"],
        width=arguments["width"],
        num_frames=arguments["num_frames"],
        base_num_frames=arguments["base_num_frames"],
        overlap_history=arguments["overlap_pixel_frames"],
        fps=fps_of(arguments["fps_flag"]),
        num_steps=arguments["N"],
        shift=arguments["shift"],
        guidance=arguments["guidance"],
        ar_step=run["ar_step"],
        causal_block_size=arguments["causal_block_size"],
        addnoise_condition=run["addnoise"],
        attention="causal" if is_causal else "full",
        clean_pass=is_causal and not is_fork,
        reuse=reuse,
        kv=kv,
    )


def _blind_segment(case: Case, run: dict[str, Any], *, dit: DiT) -> Denoised:
    """Denoise the second segment from the stored prefix, hidden as the fork hides it.

    In the first tick; without reuse always, as its prefix then never counts as clean.
    """
    arguments, size = case.settings["args"], case.settings["args"]["causal_block_size"]
    latents, prefix = case.tensor("in.noise.1").clone(), case.tensor(f"{run['name']}.prefix1")
    latents[:, : prefix.shape[1]] = prefix
    window = cut_window(latents.shape[1], chunk_frames=size, num_prefix=prefix.shape[1])
    if not run["reuse"]:
        window = replace(window, chunks=window.chunks[window.num_given :], num_given=0)
    drawn: tuple[Tensor, ...] = ()
    if run["addnoise"]:
        drawn = case.tensor(f"{run['name']}.condition_noise")[0].split(size, dim=1)
    return denoise(
        dit,
        texts_of(case, dit.config, guidance=arguments["guidance"]),
        latents,
        window=window,
        sampling=fork_sampling(arguments, run=run),
        policy=lambda _branch: fork_policy(run, coefficients=arguments["coefficients"]),
        compression=fork_compression(run, layout=token_layout(latents, chunk_frames=size)),
        condition_noise=drawn,
        make_cache=PrefixBlindCache if run["reuse"] else KVCache,
    )


def _to_bytes(frames_3THW: Tensor) -> Tensor:
    sampled = frames_3THW[:, :, ::STRIDE, ::STRIDE].permute(1, 2, 3, 0)
    return ((sampled / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
