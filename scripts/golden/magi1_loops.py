"""The reference cases of MAGI-1 that denoise a clip."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowcache.compress import ImportanceRedundancy, TokenLayout
from flowcache.policies import FlowCache, ReusePolicy, Vanilla
from flowcache.runtime.stats import RunStats
from golden.case import Case, Check, compare, compare_sets
from magi1.config import (
    EngineConfig,
    ModelConfig,
    ReleaseConfig,
    ReuseConfig,
    RuntimeConfig,
    TokenChoice,
)
from magi1.dit import DiT, set_precision
from magi1.sampler import ClipInputs, ClipSampler, KVBudget, Reuse, Sampling
from magi1.schedule import Clip, step_width
from magi1.text import SpecialTokens, chunk_captions, null_caption

LOOP_TOLERANCE = 2e-4
"""Of latents after a whole loop, relative to the largest reference value."""
DISTANCE_TOLERANCE = 1e-5
"""Of accumulated distances, absolute."""
TABLE_TOLERANCE = 5e-7
"""Of float32 values up to 1: four of their last bits."""
NOT_ACTIVE = -1

_FLAGS = {
    "PAD_STATIC": "static",
    "PAD_DYNAMIC": "dynamic",
    "PAD_BORDERNESS": "borderness",
    "PAD_HQ": "quality",
    "PAD_THREE_D_MODEL": "three_d_model",
    "PAD_TWO_D_ANIME": "two_d_anime",
    "PAD_DURATION": "duration",
    "NEG_PROMPT": "negative",
}


def relative(what: str, ours: Tensor, stored: Tensor, *, tolerance: float) -> Check:
    """Compare two tensors relative to the largest reference value."""
    size = stored.double().abs().max() if stored.numel() else torch.tensor(1.0)
    size = size.clamp(min=torch.finfo(torch.float32).tiny)
    return compare(what, ours.double() / size, stored.double() / size, tolerance=tolerance)


def config_of(case: Case) -> ReleaseConfig:
    """Return the configuration of a case, which leaves out the three paths."""
    parts = case.settings["config"]
    runtime = {
        k: tuple(v) if isinstance(v, list) else v for k, v in parts["runtime_config"].items()
    }
    return ReleaseConfig(
        ModelConfig(**parts["model_config"]),
        RuntimeConfig(**runtime, load="", t5_pretrained="", vae_pretrained=""),
        EngineConfig(**parts["engine_config"]),
    )


def build_dit(case: Case) -> DiT:
    """Build the transformer of a case with its weights."""
    dit = DiT(config_of(case).model_config)
    dit.load_state_dict(case.weights())
    set_precision(dit, torch.float32)
    return dit.eval()


def step_width_of(num_steps: int, interval: float) -> float:
    """Return what a distilled model is told of the step size."""
    return step_width(num_steps, interval=interval)


def choice_of(flags: Sequence[str]) -> TokenChoice:
    """Return the special tokens that the reference's switches ask for."""
    return TokenChoice(**{field: flag in flags for flag, field in _FLAGS.items()})


def special_tokens(case: Case) -> SpecialTokens:
    """Return the special tokens of a case."""
    names = ("caption_token", "logo_token", "other_tokens")
    return SpecialTokens(*(case.tensor(f"special.{name}") for name in names))


@dataclass(frozen=True)
class Recorded(ImportanceRedundancy):
    """Remembers which tokens it kept."""

    kept: list[Tensor] = field(default_factory=list)

    def keep(self, q_QHD: Tensor, k_LGD: Tensor, /, *, budget: int, layout: TokenLayout) -> Tensor:
        indices = super().keep(q_QHD, k_LGD, budget=budget, layout=layout)
        self.kept.append(indices)
        return indices


def build_sampler(
    case: Case, policy: ReusePolicy, change: Callable[[Sampling], Sampling], budget: KVBudget | None
) -> ClipSampler:
    """Build the loop of a case.

    Args:
        change: what is different from the release's sampling.
    """
    config, dit = config_of(case), build_dit(case)
    run = config.runtime_config
    prefix = case.tensor("prefix")[0] if "prefix" in case else None
    num_prefix = 0 if prefix is None else prefix.shape[1]
    clip = Clip(
        run.num_frames,
        num_prefix=num_prefix,
        is_image=num_prefix == 1,
        chunk_width=run.chunk_width,
        temporal_stride=run.temporal_downsample_factor,
    )
    tokens, choice = special_tokens(case), choice_of(case.settings["flags"])
    captions = chunk_captions(
        case.tensor("emb")[0, 0][case.tensor("mask")[0].bool()],
        num_chunks=len(clip.generated),
        tokens=tokens,
        choice=choice,
        max_length=config.model_config.caption_max_length,
    )
    sampling = replace(change(Sampling.of(config)), budget=budget)
    inputs = ClipInputs(
        clip,
        case.tensor("noise")[0].clone(),
        captions=dict(zip(clip.generated, captions, strict=True)),
        null_caption=null_caption(dit.null_caption, tokens=tokens, choice=choice),
        prefix=prefix,
    )
    stats = RunStats(torch.device("cpu"))
    return ClipSampler(dit, inputs, sampling, reuse=Reuse(policy), stats=stats)


def check_timesteps(case: Case, sampler: ClipSampler) -> Check:
    """Compare the table of timesteps."""
    ours = torch.tensor(sampler.timesteps)
    return compare("timesteps", ours, case.tensor("timesteps"), tolerance=TABLE_TOLERANCE)


def check_chunks(case: Case, sampler: ClipSampler) -> Iterator[Check]:
    """Compare the clean latents of every chunk that are shown."""
    clip = sampler.clip
    for chunk in clip.generated:
        own, name = clip.shown(chunk), f"chunk.{chunk - clip.num_given}"
        ours = sampler.latents[:, own.start : own.stop].unsqueeze(0)
        yield relative(name, ours, case.tensor(name), tolerance=LOOP_TOLERANCE)


def check_loop(case: Case) -> Iterator[Check]:
    """Compare latents after every tick, what is shown when, and the chunks."""
    share = case.settings.get("prev_chunks_scale", Sampling.prev_share)
    sampler = build_sampler(
        case, Vanilla(), lambda sampling: replace(sampling, prev_share=share), None
    )
    yield check_timesteps(case, sampler)
    after, shown = [], set()
    for tick, finished in sampler.run():
        after.append(sampler.latents.clone())
        for chunk in finished:
            clip = sampler.clip
            shown.add((tick.index, chunk - clip.num_given, len(clip.shown(chunk))))
    ours = torch.stack(after)
    yield relative("x_after", ours, case.tensor("x_after"), tolerance=LOOP_TOLERANCE)
    yield compare_sets("emitted", shown, {tuple(entry) for entry in case.settings["emitted"]})
    yield from check_chunks(case, sampler)


def check_reuse_loop(case: Case) -> Iterator[Check]:
    """Compare decisions, kept tokens, statistics of the latents, and the chunks."""
    settings = case.settings
    policy = FlowCache(
        threshold=settings["rel_l1_thresh"],
        warmup_steps=settings["warmup_steps"],
        compute_last_step=ReuseConfig.compute_last_step,
    )
    keeps_copy = not settings["discard_nearly_clean_chunk"]
    strategy = _strategy(settings) if settings["compress_kv_cache"] else None
    budget = None
    if strategy is not None:
        chunk_tokens = settings["chunk_tokens"]
        width = config_of(case).runtime_config.chunk_width
        layout = TokenLayout(chunk_tokens // width, chunk_tokens)
        budget = KVBudget(settings["total_cache_chunk_nums"], strategy, layout)
    sampler = build_sampler(
        case,
        policy,
        lambda sampling: replace(sampling, clean_pass=False, nearly_clean_pass=keeps_copy),
        budget,
    )
    yield check_timesteps(case, sampler)
    spread, kept_sums = [], []
    for tick, _ in sampler.run():
        chunks = sampler.latents.unflatten(1, (-1, sampler.clip.chunk_width)).movedim(1, 0)
        spread.append(torch.stack([chunks.mean((1, 2, 3, 4)), chunks.std((1, 2, 3, 4))], dim=1))
        active = {chunk: policy.accumulated[chunk] for chunk in tick.steps}
        kept_sums.append([active.get(c, NOT_ACTIVE) for c in range(len(chunks))])
    yield relative("x_stats", torch.stack(spread), case.tensor("x_stats"), tolerance=LOOP_TOLERANCE)
    yield from _check_decisions(case, sampler, torch.tensor(kept_sums))
    if strategy is not None:
        yield from _check_compression(case, sampler, strategy)
    yield from check_chunks(case, sampler)


def _strategy(settings: dict[str, Any]) -> Recorded:
    is_token = settings["compress_strategy"] == "token"
    return Recorded(
        mix=settings["mix_lambda"],
        kernel=settings["pool_kernel"],
        granularity=settings["compress_strategy"],
        queries=settings["query_granularity"],
        # whole frames and chunks are scored without weights, whatever is set
        weighting=settings["score_weighting_method"] if is_token else "none",
        power=settings["power"],
        order="score",
    )


def _check_decisions(case: Case, sampler: ClipSampler, sums: Tensor) -> Iterator[Check]:
    """Compare who was reused, the distances compared with the threshold, and the sums kept."""
    reuse = torch.full_like(case.tensor("reuse"), NOT_ACTIVE)
    stored = case.tensor("candidate")
    candidate = torch.full_like(stored, NOT_ACTIVE)
    for each in sampler.stats.passes:
        reuse[each.tick, each.chunk] = int(not each.is_computed)
        # the reference measures no distance where a chunk is computed in any case
        if stored[each.tick, each.chunk] != NOT_ACTIVE and each.accumulated is not None:
            candidate[each.tick, each.chunk] = each.accumulated
    yield compare("reuse", reuse, case.tensor("reuse"), tolerance=0)
    yield compare("candidate", candidate, stored, tolerance=DISTANCE_TOLERANCE)
    yield compare("accumulated", sums, case.tensor("accumulated"), tolerance=DISTANCE_TOLERANCE)


def _check_compression(case: Case, sampler: ClipSampler, strategy: Recorded) -> Iterator[Check]:
    """Compare the tokens that every compression kept, and the cache at the end."""
    caches = sampler.branches["cond"].caches
    yield compare_sets(
        "compressions",
        range(len(strategy.kept) // len(caches)),
        range(len(case.settings["compressions"])),
    )
    for place, indices in enumerate(strategy.kept):
        index, layer = divmod(place, len(caches))
        name = f"compress.{index}.kept.{layer}"
        yield compare_sets(f"{name} (set)", _by_head(indices), _by_head(case.tensor(name)))
    for layer, cache in enumerate(caches):
        stored = case.tensor(f"kv_final.{layer}")
        ours = torch.cat([cache.kv[0], cache.kv[1]], dim=-1)[: cache.filled]
        name = f"kv_final.{layer}, {cache.filled} rows"
        yield relative(name, ours, stored[: cache.filled], tolerance=LOOP_TOLERANCE)


def _by_head(indices_KG: Tensor) -> set[tuple[int, int]]:
    return {(head, index) for head, kept in enumerate(indices_KG.T.tolist()) for index in kept}
