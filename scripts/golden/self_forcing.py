"""The reference cases of Self-Forcing: tables, forwards, the three loops, streamed decoding."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from flowcache.attention import SDPA, Kernel
from flowcache.kv import cached_attention, caches_for
from flowcache.policies import Vanilla
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats
from flowcache.wan import vae
from flowcache.wan.cached import CachedDiT, open_branches
from flowcache.wan.calibration import ReuseConfig
from flowcache.wan.dit import DiT, DiTConfig, Embedded
from flowcache.wan.flow_match import add_noise, estimate_clean, levels_of
from flowcache.wan.reuse import StepReuse
from flowcache.wan.rounded import RoundedDiT
from flowcache.wan.unipc import UniPC, timestep_grid
from golden.case import Case, Check, Kind, compare
from self_forcing.sampler import Sampler, Sampling
from self_forcing.work import chunks_of

TOLERANCE = 2e-5
"""Of float32 forwards and few-step loops."""
MANY_STEP_TOLERANCE = 5e-5
BF16_TOLERANCE = 6e-2
"""Two units in the last place of outputs up to 4."""


@dataclass
class Calls:
    """Keeps what goes into each call of a transformer, and the velocity that comes out."""

    made: list[tuple[Tensor, float, Tensor]] = field(default_factory=list)

    def watch(self, dit: DiT) -> None:
        """Watch the calls of a transformer, those without a head included."""
        embed, run_blocks = dit.embed, dit.run_blocks
        given: list[tuple[Tensor, Tensor]] = []

        def watched_embed(x_BCFhw: Tensor, t_BF: Tensor, **rest: Any) -> Embedded:
            given[:] = [(x_BCFhw.clone(), t_BF)]
            return embed(x_BCFhw, t_BF, **rest)

        def watched_blocks(embedded: Embedded, *rest: Any, **more: Any) -> Tensor:
            hidden, ((x, t),) = run_blocks(embedded, *rest, **more), given
            height, width = x.shape[-2:]
            velocity = dit.velocity(hidden, embedded, latent_height=height, latent_width=width)
            self.made.append((x, float(t[0, 0]), velocity))
            return hidden

        dit.embed, dit.run_blocks = watched_embed, watched_blocks


def build_dit(case: Case, dtype: torch.dtype = torch.float32) -> DiT:
    """Build the transformer of a case with its weights; in bfloat16 with upstream's roundings."""
    with torch.device("meta"):
        kind = DiT if dtype is torch.float32 else RoundedDiT
        dit = kind(DiTConfig(**case.settings["config"]))
    dit.load_state_dict(case.weights(), assign=True)
    if dtype is not torch.float32:
        dit.kernel = dit.cross_kernel = Kernel("float32", _attend_in_float32)
    return dit.to(dtype).eval()


def _attend_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend as the reference did when the cases were made."""
    return SDPA(q.float(), k.float(), v.float()).to(q.dtype)


def padded(context: Tensor, config: DiTConfig) -> Tensor:
    """Return a prompt, padded with zeros to the model's length."""
    return functional.pad(context, (0, 0, 0, config.text_len - context.shape[1]))


# Tables -------------------------------------------------------------------------------------------


def check_schedule(case: Case) -> Iterator[Check]:
    """Compare noise levels, warped entries, both operations, and UniPC's grids and paths."""
    for number, entry in enumerate(case.settings["flow_match"]):
        levels, stored = levels_of(entry["shift"]), partial(_stored, case, number)
        ours = {
            "sigmas": levels.sigmas,
            "timesteps": levels.timesteps,
            "warp": levels.warped(range(1001)),
        }
        for part, values in ours.items():
            wanted = stored(part)
            # torch's linspace ends in other bits with other vector widths
            rounding = 2 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
            yield compare(f"{number}.{part}", torch.tensor(values), wanted, tolerance=rounding)
        sigmas = [levels.sigma(t) for t in stored("in.t").tolist()]
        clean, noise = stored("in.x0"), stored("in.noise")
        for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "_bf16")):
            rows = list(zip(clean.to(dtype), noise.to(dtype), sigmas, strict=True))
            noised = torch.stack([add_noise(x, n, sigma=s) for x, n, s in rows])
            cleaned = torch.stack([estimate_clean(n, v, sigma=s) for v, n, s in rows])
            yield compare(
                f"{number}.add_noise{suffix}", noised, stored(f"add_noise{suffix}"), tolerance=0
            )
            yield compare(f"{number}.x0{suffix}", cleaned, stored(f"x0{suffix}"), tolerance=0)
    for number, entry in enumerate(case.settings["unipc"]):
        name, stored = f"unipc.{number}", partial(_stored, case, f"unipc.{number}")
        timesteps, sigmas = timestep_grid(entry["steps"], shift=entry["shift"])
        yield compare(
            f"{name}.timesteps", torch.tensor(timesteps), stored("timesteps"), tolerance=0
        )
        yield compare(f"{name}.sigmas", torch.tensor(sigmas), stored("sigmas"), tolerance=0)
        trajectory, solver = stored("trajectory"), UniPC(entry["steps"], shift=entry["shift"])
        path = [trajectory[0]]
        for velocity in stored("velocity"):
            path.append(solver.step(velocity, sample=path[-1]))
        yield compare(f"{name}.trajectory", torch.stack(path), trajectory, tolerance=0)


def _stored(case: Case, name: object, part: str) -> Tensor:
    return case.tensor(f"{name}.{part}")


# Forwards -----------------------------------------------------------------------------------------


def check_masks(case: Case) -> Iterator[Check]:
    """Compare forwards of whole clips under the masks of training.

    A clip under a mask is computed by chunks: each attends to the frames that its mask shows.
    """
    dit, x = build_dit(case), case.tensor("in.x")
    context = dit.encode_context(padded(case.tensor("in.context"), dit.config))
    for run in case.settings["runs"]:
        name, size = run["name"], run["frames_per_block"]
        chunks = chunks_of(
            x.shape[2], size=size, is_first_alone=bool(run["independent_first_frame"])
        )
        t = case.tensor(f"{name}.t")
        if run["mask"] == "teacher_forcing":
            clean = case.tensor("in.clean_x")
            clean_t = torch.zeros_like(t)
            if f"{name}.aug_t" in case:
                clean_t = case.tensor(f"{name}.aug_t").expand_as(t)
            ours = _forward(
                dit, torch.cat([clean, x], 2), torch.cat([clean_t, t], 1), context, chunks
            )
            ours = ours[:, :, x.shape[2] :]
        else:
            window = run["window_frames"]
            reach = None if window < 0 else window
            ours = _forward(dit, x, t, context, chunks, window=reach)
        yield compare(f"{name}.out", ours, case.tensor(f"{name}.out"), tolerance=TOLERANCE)


def _forward(
    dit: DiT,
    x: Tensor,
    t: Tensor,
    context: Any,
    chunks: Sequence[range],
    *,
    window: int | None = None,
) -> Tensor:
    """Forward a clip, or a clean and a noisy one behind it, each chunk seeing what came before.

    A noisy chunk behind a clean clip sees the clean chunks before it, and itself.
    """
    num_frames, height, width = x.shape[2], *x.shape[-2:]
    length, per_frame = chunks[-1].stop, height * width // 4

    def visible(chunk: range) -> list[int]:
        own = [f + length for f in chunk] if num_frames > length else list(chunk)
        before = 0 if window is None else max(chunk.stop - window, 0)
        return sorted({*range(before, chunk.start), *own})

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames_of = [y.unflatten(1, (num_frames, per_frame)) for y in (q, k, v)]
        outputs = []
        clips = [(chunk, list(range(chunk.stop)), 0) for chunk in chunks]
        if num_frames > length:
            clips += [(chunk, visible(chunk), length) for chunk in chunks]
        else:
            clips = [(chunk, visible(chunk), 0) for chunk in chunks]
        for chunk, seen, offset in clips:
            own = [frame + offset for frame in chunk]
            parts = (frames_of[0][:, own], frames_of[1][:, seen], frames_of[2][:, seen])
            outputs.append(SDPA(*(part.flatten(1, 2) for part in parts)))
        return torch.cat(outputs, dim=1)

    embedded = dit.embed(x, t, fps=[16] * len(x))
    positions = torch.arange(num_frames) % length
    rope = dit.rope(positions, latent_height=height, latent_width=width)
    hidden = dit.run_blocks(embedded, rope, context, self_attend=attend)
    return dit.velocity(hidden, embedded, latent_height=height, latent_width=width)


def check_cached(case: Case) -> Iterator[Check]:
    """Compare forwards chunk by chunk through a cache, and what the cache then holds."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from _cached(case, build_dit(case, dtype), dtype)


def _cached(case: Case, dit: DiT, dtype: torch.dtype) -> Iterator[Check]:
    config, calls = dit.config, case.settings["calls"]
    context = dit.encode_context(padded(case.tensor("in.context"), config).to(dtype))
    batch = len(case.tensor("in.context"))
    caches = [
        caches_for(
            config.num_layers,
            capacity=max(call["filled_tokens"] for call in calls),
            num_heads=config.num_heads,
            head_width=config.head_width,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        for _ in range(batch)
    ]
    suffix, tolerance = ("", TOLERANCE) if dtype is torch.float32 else ("_bf16", BF16_TOLERANCE)
    settled = 0
    for number, call in enumerate(calls):
        x, t = case.tensor(f"{number}.x"), case.tensor(f"{number}.t")
        start, (height, width) = call["start_frame"] * case.settings["frame_tokens"], x.shape[-2:]
        for cache in (cache for layers in caches for cache in layers):
            cache.settle(start - settled)
        settled = start
        embedded = dit.embed(x.to(dtype), t, fps=[16] * batch)
        frames = torch.arange(call["start_frame"], call["start_frame"] + call["frames"])
        rope = dit.rope(frames, latent_height=height, latent_width=width)
        attend = cached_attention(caches, active=[range(len(rope))], kernel=dit.kernel)
        hidden = dit.run_blocks(embedded, rope, context, self_attend=attend)
        ours = dit.velocity(hidden, embedded, latent_height=height, latent_width=width)
        name = f"{number}.out{suffix}"
        if name in case:  # the last calls are stored in float32 only
            yield compare(name, ours, case.tensor(name), tolerance=tolerance)
    if dtype is not torch.float32:
        return
    for layer in range(config.num_layers):
        for half, part in enumerate("kv"):
            held = torch.stack([layers[layer].kv[half] for layers in caches])
            stored = case.tensor(f"kv.{layer}.{part}")
            yield compare(
                f"kv.{layer}.{part}", held[:, : stored.shape[1]], stored, tolerance=TOLERANCE
            )
            cross = getattr(context[layer], part)
            name = f"cross.{layer}.{part}"
            yield compare(name, cross, case.tensor(name), tolerance=TOLERANCE)


# Loops --------------------------------------------------------------------------------------------


def check_loops(case: Case) -> Iterator[Check]:
    """Compare the videos of the few-step loop, and what single calls made of their chunk."""
    for name in case.names("in.context."):
        case.tensor(name)  # all files have both, not all have runs with two samples
    for run in case.settings["runs"]:
        yield from _few_steps(case, run)


def _few_steps(case: Case, run: Mapping[str, Any]) -> Iterator[Check]:
    name, levels = run["name"], levels_of(run["shift"])
    is_bf16 = run["dtype"] == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    dit, calls = build_dit(case, dtype), Calls()
    calls.watch(dit)
    warp = levels.warped if run["warp_denoising_step"] else partial(map, float)
    sampling = Sampling(
        steps=tuple(warp(run["denoising_step_list"])),
        first_steps=tuple(warp(run["denoising_step_list_first_chunk"])),
        shift=run["shift"],
        context_noise=run["context_noise"],
        window=None if run["local_attn_size"] < 0 else run["local_attn_size"],
        sink=run["sink_size"],
    )
    yield compare(
        f"{name} warped", torch.tensor(sampling.steps), torch.tensor(run["warped"]), tolerance=1e-4
    )
    noise = case.tensor(f"{name}.noise")
    draws = [case.tensor(n) for n in _numbered(case, f"{name}.renoise.")]
    given = case.tensor(f"{name}.initial_latent") if run["initial_frames"] else None
    videos, made = [], []
    for sample in range(len(noise)):
        own = [draw.unflatten(0, (len(noise), -1))[sample] for draw in draws]
        context = case.tensor(f"in.context.{'ab'[sample]}")
        start = noise[sample] if given is None else torch.cat([given[sample], noise[sample]])
        calls.made.clear()
        videos.append(
            denoise(
                dit,
                start.to(dtype),
                {"cond": context},
                sampling,
                draws=own,
                size=run["frames_per_block"],
                is_first_alone=bool(run["independent_first_frame"]),
                num_given=run["initial_frames"],
            )
        )
        made.append(list(calls.made))
    tolerance = BF16_TOLERANCE if is_bf16 else TOLERANCE
    yield compare(
        f"{name}.out", torch.stack(videos), case.tensor(f"{name}.out"), tolerance=tolerance
    )
    for stored in _numbered(case, f"{name}.x0."):
        number = int(stored.rpartition(".")[2])
        clean = [
            estimate_clean(x[0], velocity[0], sigma=levels.sigma(t)).movedim(0, 1)
            for x, t, velocity in (each[number] for each in made)
        ]
        yield compare(stored, torch.stack(clean), case.tensor(stored), tolerance=tolerance)


def check_many_steps(case: Case) -> Iterator[Check]:
    """Compare the videos of the many-step loop with guidance, and single velocities."""
    dit, calls = build_dit(case), Calls()
    calls.watch(dit)
    for run in case.settings["runs"]:
        name, noise = run["name"], case.tensor(f"{run['name']}.noise")[0]
        sampling = Sampling(
            steps=(),
            num_steps=run["sampling_steps"],
            shift=run["shift"],
            guidance=run["guidance_scale"],
            window=None if run["local_attn_size"] < 0 else run["local_attn_size"],
            sink=run["sink_size"],
        )
        ticks = timestep_grid(sampling.num_steps, shift=sampling.shift)[0]
        yield compare(
            f"{name} timesteps", torch.tensor(ticks), torch.tensor(run["timesteps"]), tolerance=0
        )
        if run["initial_frames"]:
            noise = torch.cat([case.tensor(f"{name}.initial_latent")[0], noise])
        texts = {"cond": case.tensor("in.context.a"), "uncond": case.tensor("in.context.neg")}
        calls.made.clear()
        ours = denoise(
            dit,
            noise,
            texts,
            sampling,
            size=run["frames_per_block"],
            is_first_alone=bool(run["independent_first_frame"]),
            num_given=run["initial_frames"],
        )
        out = case.tensor(f"{name}.out")
        yield compare(f"{name}.out", ours.unsqueeze(0), out, tolerance=MANY_STEP_TOLERANCE)
        for stored in _numbered(case, f"{name}.flow."):
            velocity = calls.made[int(stored.rpartition(".")[2])][2].movedim(1, 2)
            yield compare(stored, velocity, case.tensor(stored), tolerance=MANY_STEP_TOLERANCE)


def check_rolling(case: Case) -> Iterator[Check]:
    """Compare the videos of the rolling loop."""
    dit, settings = build_dit(case), case.settings
    for run in settings["runs"]:
        name, levels = run["name"], levels_of(settings["shift"])
        sampling = Sampling(
            steps=levels.warped(run["denoising_step_list"]),
            shift=settings["shift"],
            window=settings["window_frames"],
            is_rolling=True,
        )
        ours = denoise(
            dit,
            case.tensor(f"{name}.noise")[0],
            {"cond": case.tensor("in.context.a")},
            sampling,
            draws=[case.tensor(n) for n in _numbered(case, f"{name}.renoise.")],
            size=settings["frames_per_block"],
        )
        out = case.tensor(f"{name}.out")
        yield compare(f"{name}.out", ours.unsqueeze(0), out, tolerance=TOLERANCE)


def denoise(
    dit: DiT,
    start_FChw: Tensor,
    texts: Mapping[str, Tensor],
    sampling: Sampling,
    *,
    draws: Sequence[Tensor] = (),
    size: int,
    is_first_alone: bool = False,
    num_given: int = 0,
) -> Tensor:
    """Denoise a video with noise that is given, `[F, C, h, w]`; the last chunk is fed, too.

    Args:
        size: frames of a chunk.
        num_given: frames that are clean from the start.
    """
    left = iter(draws)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        noise = next(left)
        assert noise.shape == shape, f"noise of {list(shape)} is drawn, recorded {noise.shape}"
        return noise.to(dtype)

    latents = start_FChw.movedim(1, 0).clone()
    chunks = chunks_of(len(start_FChw), size=size, is_first_alone=is_first_alone)
    stats, ranks = RunStats(latents.device), Ranks()
    branches = open_branches(
        dit,
        {name: padded(text, dit.config) for name, text in texts.items()},
        stats=stats,
        ranks=ranks,
        kv_tokens=latents[0].numel() // 2,
        on_host=False,
    )
    height, width = latents.shape[-2:]
    cached = CachedDiT(
        dit, branches, stats=stats, ranks=ranks, size=(height, width), num_chunks=len(chunks)
    )
    every = {name: Vanilla() for name in branches}
    sampler = Sampler(
        cached,
        sampling,
        latents,
        chunks=chunks,
        num_given=sum(chunk.stop <= num_given for chunk in chunks),
        draw=draw,
        reuse=StepReuse(cached, ReuseConfig(), policies=every, guidance=sampling.guidance),
    )
    for _ in sampler.denoise():
        pass
    if not sampling.is_rolling:  # upstream does, and its calls are stored
        few = bool(sampling.steps)
        sampler.feed_clean(len(chunks) - 1, timestep=sampling.context_noise if few else 0)
    assert next(left, None) is None, "the reference drew more noise"
    return latents.movedim(1, 0)


def _numbered(case: Case, prefix: str) -> list[str]:
    return sorted(case.names(prefix), key=lambda name: int(name.rpartition(".")[2]))


# VAE ----------------------------------------------------------------------------------------------


def check_vae(case: Case) -> Iterator[Check]:
    """Compare encoding an image, decoding at once, and decoding chunk by chunk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vae.safetensors"
        save_file(case.weights(), path)
        model = vae.load(path, device="cpu")
    for name, values in (("mean", model.mean), ("std", model.std)):
        stored = torch.tensor(case.settings[name])
        yield compare(name, values.flatten(), stored, tolerance=0)
    latents, video = case.tensor("in.latent").movedim(2, 1), case.tensor("out.video").movedim(2, 1)
    yield compare("out.video", model.decode(latents), video, tolerance=TOLERANCE)
    stream = model.stream()
    parts = [stream.decode(latents[:, :, a:b]) for a, b in case.settings["chunks"]]
    yield compare("out.video, streamed", torch.cat(parts, dim=2), video, tolerance=TOLERANCE)
    sizes = torch.tensor([part.shape[2] for part in parts])
    stored = torch.tensor(case.settings["frames_of_chunk"])
    yield compare("frames of a chunk", sizes, stored, tolerance=0)
    image = model.encode(case.tensor("in.image")).movedim(2, 1)
    yield compare("out.image_latent", image, case.tensor("out.image_latent"), tolerance=TOLERANCE)


KINDS = (
    Kind("tables of Self-Forcing", lambda case: "flow_match" in case.settings, check_schedule),
    Kind(
        "masked forwards of Self-Forcing",
        lambda case: "frame_tokens" in case.settings and "in.clean_x" in case,
        check_masks,
    ),
    Kind(
        "cached forwards of Self-Forcing",
        lambda case: "frame_tokens" in case.settings and "calls" in case.settings,
        check_cached,
    ),
    Kind(
        "few-step loop of Self-Forcing",
        lambda case: (
            "frame_tokens" in case.settings
            and "denoising_step_list_first_chunk" in case.settings.get("runs", [{}])[0]
        ),
        check_loops,
    ),
    Kind(
        "many-step loop of Self-Forcing",
        lambda case: (
            "frame_tokens" in case.settings
            and "sampling_steps" in case.settings.get("runs", [{}])[0]
        ),
        check_many_steps,
    ),
    Kind(
        "rolling loop of Self-Forcing",
        lambda case: {"frame_tokens", "window_frames"} <= set(case.settings),
        check_rolling,
    ),
    Kind("streamed VAE", lambda case: "frames_of_chunk" in case.settings, check_vae),
)
