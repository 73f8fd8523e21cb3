"""The reference cases of SkyReels-V2 that denoise: whole windows and long videos."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowcache.compress import ImportanceRedundancy, Recent, TokenLayout
from flowcache.kv import Compression, KVCache, peak_tokens
from flowcache.policies import Decision, FlowCache, ReusePolicy, TeaCache, Vanilla, polynomial
from flowcache.predict import ResultStore
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.wan.calibration import COEFFICIENTS
from flowcache.wan.dit import PATCH, DiT, DiTConfig
from flowcache.wan.given import Conditioning
from golden.case import Case, Check, compare, compare_sets, known
from skyreels_v2.config import KVConfig, ReuseConfig, RunConfig
from skyreels_v2.pipeline import generate
from skyreels_v2.sampler import Branch, Run, Sampling, WindowSampler
from skyreels_v2.window import Window, cut_window

LOOP_TOLERANCE = 1e-4
BRANCHES = ("cond", "uncond")
"""In the order in which the reference calls the model."""

BYTE_TOLERANCE = 1
STRIDE, FRAMES_PER_LATENT, LATENT_CHANNELS = 8, 4, 16
BLIND = (
    "the fork hides the prefix in the first tick of a segment, ours shows it; equal with the prefix"
    " hidden there"
)
BLIND_WITHOUT_REUSE = BLIND.replace("the first tick of a segment", "every tick")
TAIL = "upstream never denoises frames beyond a multiple of the block: still its noise"
WRAP = "upstream's call counter wraps, its warm-up comes back; equal with that counter in our rule"


def fps_of(flag: int) -> int:
    """Return a frame rate that chooses this row of the fps embedding."""
    return 24 if flag else 16


def build_dit(case: Case, *, image_dim: int | None = None) -> DiT:
    """Build the transformer of a case with its weights."""
    with torch.device("meta"):
        dit = DiT(DiTConfig(**case.settings["config"], image_dim=image_dim))
    # the fork's key/value buffers, saved with its weights, are what its last run left behind
    weights = {key: value for key, value in case.weights().items() if "_cache_" not in key}
    dit.load_state_dict(weights, assign=True)
    return dit.eval()


def texts_of(case: Case, config: DiTConfig, *, guidance: float) -> dict[str, Tensor]:
    """Return the prompt of every guidance branch, padded with zeros to the model's length."""
    texts = {name: case.tensor(f"in.context_{name}") for name in BRANCHES}
    padded = {
        name: functional.pad(text, (0, 0, 0, config.text_len - text.shape[1]))
        for name, text in texts.items()
    }
    return padded if guidance > 1 else {"cond": padded["cond"]}


def sampling_of(run: dict[str, Any], **own: Any) -> Sampling:
    """Return the denoising loop of a run."""
    return Sampling(
        num_steps=run["N"],
        shift=run["shift"],
        guidance=run["guidance"],
        lag=run["ar_step"],
        fps=fps_of(run["fps_flag"]),
        **own,
    )


@dataclass
class Denoised:
    """What came out of denoising one window."""

    rows: list[Tensor]
    """The latents after every tick."""
    stats: RunStats

    @property
    def latents(self) -> Tensor:
        return self.rows[-1]

    def skipped_steps(self) -> set[tuple[str, int, int]]:
        """Return (branch, chunk, own step) of everything that was reused."""
        return {(p.branch, p.chunk, p.step) for p in self.stats.passes if not p.is_computed}

    def computed_calls(self) -> set[int]:
        """Return the model calls that ran the blocks: branches alternate within a tick."""
        names = BRANCHES[: len({p.branch for p in self.stats.passes})]
        return {
            p.tick * len(names) + names.index(p.branch) for p in self.stats.passes if p.is_computed
        }


def denoise(
    dit: DiT,
    texts: dict[str, Tensor],
    latents: Tensor,
    *,
    window: Window,
    sampling: Sampling,
    policy: Callable[[str], ReusePolicy] = lambda _branch: Vanilla(),
    compression: Compression | None = None,
    condition_noise: Iterable[Tensor] = (),
    make_cache: Callable[..., KVCache] = KVCache,
) -> Denoised:
    """Denoise a window, with keys and values in a cache of the size that surely suffices.

    Args:
        policy: makes the reuse policy of a branch.
        condition_noise: what is blended into the prefix, one draw after the other.
    """
    per_frame = latents.shape[-2] // PATCH[1] * (latents.shape[-1] // PATCH[2])
    sizes = [len(chunk) * per_frame for chunk in window.chunks]
    capacity = peak_tokens(
        sampling.ticks(window),
        chunk_tokens={chunk: sizes[chunk] for chunk in window.generated},
        given=sum(sizes[: window.num_given]),
        budget=None if compression is None else compression.budget,
    )
    draws, stats, model = iter(condition_noise), RunStats(latents.device), dit.config
    branches = {}
    for name, text in texts.items():
        caches = [
            make_cache(
                capacity,
                num_heads=model.num_heads,
                head_width=model.head_width,
                dtype=dit.dtype,
                device=latents.device,
            )
            for _ in range(model.num_layers if sampling.attention == "causal" else 0)
        ]
        context = dit.encode_context(text)
        branches[name] = Branch(context, policy(name), ResultStore(), caches)
    moving = latents.clone()
    run = Run(dit, sampling, stats, compression=compression, draw_noise=lambda _like: next(draws))
    sampler = WindowSampler(run, moving, window=window, branches=branches)
    return Denoised([moving.clone() for _ in sampler.denoise()], stats)


def check_df_loop(case: Case) -> Iterator[Check]:
    """Compare upstream's loop, without reuse, with full and with block-causal attention."""
    dit = build_dit(case)
    for run in case.settings["runs"]:
        name, size, num_frames = run["name"], run["causal_block_size"], run["num_latent_frames"]
        settled = num_frames - num_frames % size
        noise = case.tensor(f"{name}.noise")
        latents = noise[:, :settled].clone()
        if run["num_prefix"]:
            latents[:, : run["num_prefix"]] = case.tensor(f"{name}.prefix")
        if run["num_end"]:
            latents = torch.cat([latents, case.tensor(f"{name}.end")], dim=1)
        window = cut_window(
            settled,
            chunk_frames=size,
            num_prefix=run["num_prefix"],
            has_end=bool(run["num_end"]),
        )
        attention = "causal" if run["causal_mask_block"] else "full"
        sampling = sampling_of(run, attention=attention, clean_pass=True, addnoise=run["addnoise"])
        noises = case.tensor(f"{name}.condition_noise") if run["addnoise"] else ()
        ours = denoise(
            dit,
            texts_of(case, dit.config, guidance=run["guidance"]),
            latents,
            window=window,
            sampling=sampling,
            condition_noise=noises,
        )
        final, what = case.tensor(f"{name}.final"), f"{name}.final"
        if settled < num_frames:
            tail = compare(f"{what}, tail", noise[:, settled:], final[:, settled:], tolerance=0)
            yield known(tail, TAIL)
            what += f", {settled} settled frames"
        yield compare(what, ours.latents[:, :settled], final[:, :settled], tolerance=LOOP_TOLERANCE)
        if f"{name}.rows" in case:
            rows, stored = torch.stack(ours.rows), case.tensor(f"{name}.rows")
            yield compare(
                f"{name}.rows",
                rows[:, :, :settled],
                stored[:, :, :settled],
                tolerance=LOOP_TOLERANCE,
            )


@dataclass
class Replay(ReusePolicy):
    """Computes in the ticks that a record says."""

    is_computed: Sequence[int]
    needs_signals = False

    def plan(self, tick: Any, signals: Any, *, stored: Any) -> dict[int, Decision]:
        return {chunk: Decision(bool(self.is_computed[tick.index])) for chunk in tick.steps}


@dataclass
class WrappingCounter(ReusePolicy):
    """Our TeaCache with upstream's counter of model calls, which starts anew every `num_steps`."""

    rule: TeaCache
    place: int
    """Place of the branch among the calls of a tick."""
    num_branches: int
    num_steps: int

    def plan(self, tick: Any, signals: Any, *, stored: Any) -> dict[int, Decision]:
        counter = (tick.index * self.num_branches + self.place) % self.num_steps
        wrapped = replace(
            tick, index=counter // self.num_branches, num_ticks=tick.num_ticks + self.num_steps
        )
        return self.rule.plan(wrapped, signals, stored=stored)


def check_teacache(case: Case) -> Iterator[Check]:
    """Compare TeaCache: latents by upstream's own decisions, decisions up to its counter's wrap."""
    dit = build_dit(case)
    for run in case.settings["runs"]:
        name, is_ret = run["name"], run["use_ret_steps"]
        texts = texts_of(case, dit.config, guidance=run["guidance"])
        computed = case.tensor(f"{name}.computed").tolist()
        stored = {call for call, is_computed in enumerate(computed) if is_computed}
        signal = "timestep" if is_ret else "timestep_embedding"
        sampling = sampling_of(run, attention="full", clean_pass=True, signal=signal)
        sample = partial(
            denoise,
            dit,
            texts,
            case.tensor(f"{name}.noise"),
            window=cut_window(run["num_latent_frames"], chunk_frames=run["causal_block_size"]),
            sampling=sampling,
        )
        places = {branch: place for place, branch in enumerate(texts)}
        replayed = sample(policy=lambda branch: Replay(computed[places[branch] :: len(places)]))  # noqa: B023
        yield compare(
            f"{name}.final, its calls replayed",
            replayed.latents,
            case.tensor(f"{name}.final"),
            tolerance=LOOP_TOLERANCE,
        )
        rule = partial(TeaCache, run["threshold"], *rule_of(run, run["coefficients"]))
        ours = sample(policy=lambda _branch: rule()).computed_calls()  # noqa: B023
        # our last tick is always computed; upstream's rule for it never fires
        before_wrap = set(range(min(run["num_steps"], len(computed) - len(places))))
        yield compare_sets(
            f"{name}.computed up to the wrap", ours & before_wrap, stored & before_wrap
        )
        wrapping = partial(WrappingCounter, num_branches=len(places), num_steps=run["num_steps"])
        as_upstream = sample(policy=lambda branch: wrapping(rule(), places[branch]))  # noqa: B023
        after = compare_sets(
            f"{name}.computed after the wrap", as_upstream.computed_calls(), stored
        )
        yield known(after, f"{len(ours ^ stored)} of {len(computed)} calls differ: {WRAP}")


def coefficients_name(size: str, *, is_ret: bool) -> str:
    """Return our name of the polynomial that the reference calls `1.3B` or `14B`."""
    return f"t2v-{size.lower()}" + ("-ret" if is_ret else "")


def rule_of(run: dict[str, Any], coefficients: str) -> tuple[int, Callable[[float], float]]:
    """Return the warm-up steps and the polynomial of a run."""
    is_ret = run["use_ret_steps"]
    name = coefficients_name(coefficients, is_ret=is_ret)
    return 5 if is_ret else 1, polynomial(COEFFICIENTS[name])


def fork_policy(run: dict[str, Any], *, coefficients: str) -> ReusePolicy:
    """Return the reuse policy of a run of the published FlowCache."""
    if not run["reuse"]:
        return Vanilla()
    return FlowCache(run["threshold"], *rule_of(run, coefficients))


def fork_compression(run: dict[str, Any], *, layout: TokenLayout) -> Compression | None:
    """Return the KV budget of a run of the published FlowCache."""
    if run["budget_block"] > 0:
        budget = int(run["budget_block"] * layout.chunk_tokens)
        strategy = ImportanceRedundancy(order="score")
        return Compression(budget, partial(strategy.keep, budget=budget, layout=layout))
    if run["kvrange"] is not None:
        budget = run["kvrange"] * layout.chunk_tokens
        return Compression(budget, partial(Recent().keep, budget=budget, layout=layout))
    return None


def fork_sampling(arguments: dict[str, Any], *, run: dict[str, Any]) -> Sampling:
    """Return the loop of the published FlowCache: causal, no clean pass."""
    given = {**arguments, **run}
    return sampling_of(given, attention="causal", clean_pass=False, addnoise=given["addnoise"])


def token_layout(latents: Tensor, *, chunk_frames: int) -> TokenLayout:
    """Return the tokens of a frame and of a chunk."""
    per_frame = latents.shape[-2] // PATCH[1] * (latents.shape[-1] // PATCH[2])
    return TokenLayout(per_frame, per_frame * chunk_frames)


def check_fork_segment(case: Case) -> Iterator[Check]:
    """Compare the published FlowCache on a window without a prefix: reuse and KV compression."""
    dit, arguments = build_dit(case), case.settings["args"]
    size, noise = arguments["causal_block_size"], case.tensor("in.noise")
    texts = texts_of(case, dit.config, guidance=arguments["guidance"])
    for run in case.settings["runs"]:
        name = run["name"]
        ours = denoise(
            dit,
            texts,
            noise,
            window=cut_window(arguments["num_latent_frames"], chunk_frames=size),
            sampling=fork_sampling(arguments, run=run),
            policy=lambda _branch: fork_policy(run, coefficients=arguments["coefficients"]),  # noqa: B023
            compression=fork_compression(run, layout=token_layout(noise, chunk_frames=size)),
        )
        stored = case.tensor(f"{name}.final")
        yield compare(f"{name}.final", ours.latents, stored, tolerance=LOOP_TOLERANCE)
        skipped = {
            (branch, chunk, step)
            for branch in texts
            for chunk, steps in enumerate(run["skipped_own_steps"])
            for step in steps
        }
        yield compare_sets(f"{name}.skipped_own_steps", ours.skipped_steps(), skipped)


# Long videos --------------------------------------------------------------------------------------


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
