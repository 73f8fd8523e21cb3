"""The reference cases of SkyReels-V2 that denoise: whole windows and long videos."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowcache.compress import ImportanceRedundancy, Recent, TokenLayout
from flowcache.kv import Compression, KVCache, peak_tokens
from flowcache.policies import Decision, FlowCache, ReusePolicy, TeaCache, Vanilla, polynomial
from flowcache.predict import ResultStore
from flowcache.runtime.stats import RunStats
from flowcache.wan.dit import PATCH, DiT, DiTConfig
from golden.case import Case, Check, compare, compare_sets, known
from skyreels_v2.calibration import COEFFICIENTS
from skyreels_v2.sampler import Branch, Run, Sampling, WindowSampler
from skyreels_v2.window import Window, cut_window

LOOP_TOLERANCE = 1e-4
BRANCHES = ("cond", "uncond")
"""In the order in which the reference calls the model."""

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
        sampling = Sampling(
            num_steps=run["N"],
            shift=run["shift"],
            guidance=run["guidance"],
            lag=run["ar_step"],
            attention="causal" if run["causal_mask_block"] else "full",
            clean_pass=True,
            fps=fps_of(run["fps_flag"]),
            addnoise=run["addnoise"],
        )
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
        sampling = Sampling(
            num_steps=run["N"],
            shift=run["shift"],
            guidance=run["guidance"],
            lag=run["ar_step"],
            attention="full",
            clean_pass=True,
            fps=fps_of(run["fps_flag"]),
            signal="timestep" if is_ret else "timestep_embedding",
        )
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
        rule = partial(
            TeaCache,
            run["threshold"],
            5 if is_ret else 1,
            polynomial(COEFFICIENTS[coefficients_name(run["coefficients"], is_ret=is_ret)]),
        )
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


def fork_policy(run: dict[str, Any], *, coefficients: str) -> ReusePolicy:
    """Return the reuse policy of a run of the published FlowCache."""
    if not run["reuse"]:
        return Vanilla()
    is_ret = run["use_ret_steps"]
    name = coefficients_name(coefficients, is_ret=is_ret)
    return FlowCache(run["threshold"], 5 if is_ret else 1, polynomial(COEFFICIENTS[name]))


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
    return Sampling(
        num_steps=arguments["N"],
        shift=arguments["shift"],
        guidance=arguments["guidance"],
        lag={**arguments, **run}["ar_step"],
        attention="causal",
        clean_pass=False,
        fps=fps_of(arguments["fps_flag"]),
        addnoise={**arguments, **run}["addnoise"],
    )


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
