"""The reference cases of MAGI-1: transformer, 8-bit layers, VAE, tables, text, prompts, clips."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowcache.compress import ImportanceRedundancy, TokenLayout
from flowcache.kv import Attend
from flowcache.policies import FlowCache, ReusePolicy, Vanilla
from flowcache.runtime.stats import RunStats
from golden.case import Case, Check, Kind, by_head, compare, compare_sets
from magi1.config import (
    EngineConfig,
    ModelConfig,
    ReleaseConfig,
    ReuseConfig,
    RuntimeConfig,
    TokenChoice,
)
from magi1.dit import DiT, set_precision
from magi1.fp8 import FP8, Fp8Linear, SmoothFp8Linear, emulated_product
from magi1.sampler import ClipInputs, ClipSampler, Reuse
from magi1.sampling import KVBudget, Sampling
from magi1.schedule import Clip, Clock, interval_table, step_width, timestep_table, visible
from magi1.text import SpecialTokens, chunk_captions, clean, clean_once, null_caption
from magi1.vae import VAE, Tiling, ViTVAE, parse_config

UNIT_TOLERANCE = 5e-5
"""Of one forward, relative to the largest reference value."""
TABLE_TOLERANCE = 5e-7
"""Of float32 values up to 1: four of their last bits."""
WIDTH = 6
"""Latents of a chunk in every case."""
PADDING = -1

LOOP_TOLERANCE = 2e-4
"""Of latents after a whole loop, relative to the largest reference value."""
DISTANCE_TOLERANCE = 1e-5
"""Of accumulated distances, absolute."""
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


close = partial(relative, tolerance=UNIT_TOLERANCE)


def build_dit(case: Case) -> DiT:
    """Build the transformer of a case with its weights."""
    dit = DiT(config_of(case).model_config)
    dit.load_state_dict(case.weights())
    set_precision(dit, torch.float32)
    return dit.eval()


def choice_of(flags: Sequence[str]) -> TokenChoice:
    """Return the special tokens that the reference's switches ask for."""
    return TokenChoice(**{field: flag in flags for flag, field in _FLAGS.items()})


def special_tokens(case: Case) -> SpecialTokens:
    """Return the special tokens of a case."""
    names = ("caption_token", "logo_token", "other_tokens")
    return SpecialTokens(*(case.tensor(f"special.{name}") for name in names))


def ranged(
    dit: DiT, past: Sequence[Tensor], ranges: Sequence[Sequence[int]], seen: dict[int, Tensor]
) -> Attend:
    """Attend as the reference does: query range i to key range i of cached and current tokens.

    The keys and values of the call are put into `seen`, by layer.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen[layer] = torch.cat([k, v], dim=-1)[0]
        old_k, old_v = past[layer].unsqueeze(0).chunk(2, dim=-1)
        k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        parts = zip(q.chunk(len(ranges), dim=1), ranges, strict=True)
        return torch.cat([dit.kernel(part, k[:, a:b], v[:, a:b]) for part, (a, b) in parts], dim=1)

    return attend


def check_written(
    case: Case, prefix: str, seen: dict[int, Tensor], *, start: int
) -> Iterator[Check]:
    """Compare the keys and values in the cache after a call that wrote its own from `start` on."""
    for layer, kv in seen.items():
        cache = case.tensor(f"kv_in.{layer}").clone()
        cache[start : start + len(kv)] = kv[: len(cache) - start]
        name = f"{prefix}kv_out.{layer}"
        yield close(name, cache, case.tensor(name))


def check_base_forward(case: Case) -> Iterator[Check]:
    """Compare the three passes of a base model, and its embeddings."""
    dit, size = build_dit(case), case.settings["chunk_tokens"]
    call = case.settings["calls"]["out_cond"]
    first, num_layers = call["slice_point"], dit.config.num_layers
    x, t = case.tensor("x"), case.tensor("t")
    text, mask = case.tensor("y")[:, 0], case.tensor("mask")[:, 0].bool()
    past = [case.tensor(f"kv_in.{layer}")[: first * size] for layer in range(num_layers)]
    seen: dict[int, Tensor] = {}
    attend = ranged(dit, past, case.tensor("kv_range").tolist(), seen)
    forward = partial(dit, mask_RL=mask, first_frame=first * WIDTH, self_attend=attend)
    yield close("out_cond", forward(x, t, text), case.tensor("out_cond"))
    yield close("out_prev", forward(x, t, text, is_null=True), case.tensor("out_prev"))
    yield from check_written(case, "", seen, start=first * size)
    alone = x[0, :, WIDTH:].unflatten(1, (-1, WIDTH)).movedim(1, 0)
    ours = dit(alone, t[0, 1:, None], text[1:], mask_RL=mask[1:], is_null=True)
    yield close("out_uncond", ours, case.tensor("out_uncond"))
    # one row per chunk of the batch, which is laid out as one sequence
    own = torch.tensor([[chunk * size, (chunk + 1) * size] for chunk in range(len(alone))])
    yield compare("uncond_kv_range", own, case.tensor("uncond_kv_range"), tolerance=0)
    ours = dit(x[:, :, :WIDTH], t[:, 1:2], text[:1], mask_RL=mask[:1])
    yield close("out_first", ours, case.tensor("out_first"))
    yield from check_embeddings(case, dit, first=first)


def check_embeddings(case: Case, dit: DiT, *, first: int) -> Iterator[Check]:
    """Compare tokens, condition, text and rotary angles of the conditional pass."""
    x, t, mask = case.tensor("x"), case.tensor("t"), case.tensor("mask")[:, 0].bool()
    embedded = dit.embed(x, t, is_null=False)
    yield close("pre.tokens", embedded.tokens.transpose(0, 1), case.tensor("pre.tokens"))
    yield close("pre.condition", embedded.condition, case.tensor("pre.condition"))
    text = dit.y_embedder.y_proj_xattn(case.tensor("y")[:, 0])[mask]
    yield close("pre.caption", text, case.tensor("pre.caption"))
    rope = dit.rope_table(
        first_frame=first * WIDTH,
        num_frames=x.shape[2],
        latent_height=x.shape[3],
        latent_width=x.shape[4],
    )
    ours = torch.cat([rope[..., 1], rope[..., 0]], dim=1)
    yield close("pre.rope", ours, case.tensor("pre.rope"))
    owner = torch.arange(t.shape[1]).repeat_interleave(case.settings["chunk_tokens"]).unsqueeze(1)
    yield compare("pre.condition_map", owner, case.tensor("pre.condition_map"), tolerance=0)


def check_distilled_forward(case: Case) -> Iterator[Check]:
    """Compare calls of a distilled model without and with the nearly clean copy."""
    settings, dit = case.settings, build_dit(case)
    call, size = settings["call"], settings["chunk_tokens"]
    x, t = case.tensor("x"), case.tensor("t")
    text, mask = case.tensor("y")[:, 0], case.tensor("mask")[:, 0].bool()
    first, num_chunks = call["slice_point"], t.shape[1]
    past = [case.tensor(f"kv_in.{i}")[: first * size] for i in range(dit.config.num_layers)]
    for kind in ("plain", "near"):
        # the copy of the oldest noisy chunk goes last, at the place behind the newest
        order = [*range(num_chunks), *([1] if kind == "near" else [])]
        times, ranges = case.tensor(f"{kind}.forward_t"), case.tensor(f"{kind}.forward_kv_range")
        seen: dict[int, Tensor] = {}
        out = dit(
            torch.cat([x[:, :, c * WIDTH : (c + 1) * WIDTH] for c in order], dim=2),
            times,
            text[order],
            mask_RL=mask[order],
            first_frame=first * WIDTH,
            step_width=step_width(call["num_steps"], interval=call["distill_interval"]),
            self_attend=ranged(dit, past, ranges.tolist(), seen),
        )
        yield close(f"{kind}.forward_out", out, case.tensor(f"{kind}.forward_out"))
        seen = {layer: kv[: num_chunks * size] for layer, kv in seen.items()}
        yield from check_written(case, f"{kind}.", seen, start=first * size)
        velocity = out[:, :, WIDTH : num_chunks * WIDTH].clone()
        if kind == "near":
            share = settings["prev_chunks_scale"]
            velocity[:, :, :WIDTH] *= share
            velocity[:, :, :WIDTH] += (1 - share) * out[:, :, num_chunks * WIDTH :]
        yield close(f"{kind}.velocity", velocity, case.tensor(f"{kind}.velocity"))
    yield compare(
        "kv_range", case.tensor("kv_range"), case.tensor("plain.forward_kv_range"), tolerance=0
    )
    for num_steps, interval in settings["dt_grid"]:
        width = step_width(num_steps, interval=interval)
        ours = dit(x[:, :, :WIDTH], t[:, 1:2], text[1:2], mask_RL=mask[1:2], step_width=width)
        name = f"dt.{num_steps}_{interval:g}"
        yield close(name, ours, case.tensor(name))


def check_fp8(case: Case) -> Iterator[Check]:
    """Compare quantised activations and outputs of both kinds of 8-bit layers."""
    for kind, layer_type in (("per_tensor", Fp8Linear), ("smooth", SmoothFp8Linear)):
        layer = layer_type(case.settings["in_features"], case.settings["out_features"])
        for name, parameter in layer.named_parameters():
            parameter.copy_(case.tensor(f"{kind}.{name}").to(parameter.dtype))
        stored = {
            name: case.tensor(f"{kind}.{name}")
            for name in ("weight_bits", "x", "xq", "out_f32", "out_bf16")
        }
        exact = partial(compare, tolerance=0)
        bits = layer.weight.view(torch.uint8).long()
        yield exact(f"{kind}.weight_bits", bits, stored["weight_bits"])
        x = stored["x"].to(torch.bfloat16)
        quantised = layer.quantised(x)
        assert quantised.dtype == FP8
        yield exact(f"{kind}.xq", quantised.float(), stored["xq"])
        product = emulated_product(
            quantised.flatten(0, -2),
            layer.weight[0],
            x_scale=layer.input_scale[0],
            w_scale=layer.weight_scale[0],
        ).view_as(stored["out_f32"])
        yield close(f"{kind}.out_f32", product, stored["out_f32"])
        yield close(f"{kind}.out_bf16", layer(x).float(), stored["out_bf16"])


def check_vae(case: Case) -> Iterator[Check]:
    """Compare encoding and decoding in tiles."""
    settings, tile = case.settings, case.settings["tile"]
    model = ViTVAE(parse_config(settings["ddconfig"], source=case.name)).eval()
    model.load_state_dict(case.weights())
    tiling = Tiling(
        frames=tile["tile_sample_min_length"],
        height=tile["tile_sample_min_height"],
        width=tile["tile_sample_min_width"],
        overlap=tile["spatial_tile_overlap_factor"],
    )
    vae = VAE(model, scale=settings["scale_factor"] or 1.0, tiling=tiling)
    video = case.tensor("video").float() / 127.5 - 1
    frames = vae.decode(case.tensor("z"))[0].movedim(0, 1)
    image = vae.decode(case.tensor("z")[:, :, :1])[0].movedim(0, 1)
    pairs = {
        "moments_small": model.encoder(case.tensor("moments_small_in")),
        "latents_tiled": vae.encode(video),
        "latents_image": vae.encode(video[:, :, :1]),
        "decoded": frames,
        "decoded_image": image,
    }
    for name, ours in pairs.items():
        yield close(name, ours, case.tensor(name))
    # a value next to a whole number may be cut off to either side
    levels = (frames * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
    yield compare("decoded_u8 (levels)", levels, case.tensor("decoded_u8"), tolerance=1)


def check_timesteps(case: Case) -> Iterator[Check]:
    """Compare tables of timesteps and of step lengths."""
    for num_steps, mode in case.settings["rows"]:
        key = f"{num_steps}.{mode.replace(',', '_')}"
        table = timestep_table(num_steps, shortcut_mode=mode)
        yield compare(f"t.{key}", table, case.tensor(f"t.{key}"), tolerance=TABLE_TOLERANCE)
        ours = torch.tensor(interval_table(num_steps, shortcut_mode=mode))
        yield compare(f"interval.{key}", ours, case.tensor(f"interval.{key}"), tolerance=0)
    other = case.settings["other"]
    for name in case.names("other."):
        warp: Any = name.split(".")[1]
        ours = timestep_table(other["num_steps"], warp=warp, shift=other["shift_of_sd3_shift"])
        yield compare(name, ours, case.tensor(name), tolerance=TABLE_TOLERANCE)


def check_schedules(case: Case) -> Iterator[Check]:
    """Compare stages, ticks, windows and flags of every setting."""
    for setting in case.settings["settings"]:
        yield from check_schedule(case, setting)


def check_schedule(case: Case, setting: dict[str, Any]) -> Iterator[Check]:
    """Compare one setting; every table is built as the reference lays it out."""
    num_prefix = setting["prefix_latents"]
    clip = Clip(setting["num_frames"], num_prefix, is_image=num_prefix == 1)
    clock = Clock(
        num_steps=setting["num_steps"],
        window=setting["window_size"],
        reaches=tuple(setting["noise2clean_kvrange"]),
        clean_reach=setting["clean_chunk_kvrange"],
        shortcut_mode=setting["shortcut_mode"],
        nearly_clean=setting["nearly_clean_threshold"],
    )
    rows: dict[str, list[Any]] = {name: [] for name in _SCHEDULE_TABLES}
    intervals = interval_table(clock.num_steps, shortcut_mode=clock.shortcut_mode)
    for tick in clock.ticks(clip):
        stage, index = divmod(tick.index, clock.stage)
        oldest, newest = min(tick.steps), max(tick.steps)
        feeds = oldest > clip.num_given and index == 0
        first, steps = oldest - feeds, list(tick.steps.values())
        num = newest + 1 - first
        flag = int(clock.is_nearly_clean(tick.steps[oldest]))
        rows["step_scalars"].append(
            [stage, index, first, newest + 1, num, int(feeds), flag, num * clip.chunk_width]
        )
        rows["timestep_index"].append(steps)
        times = [setting["clean_t"]] * feeds + clock.timesteps()[steps].tolist()
        rows["t"].append(times)
        seen = [visible(first, clock.reach_clean())] * feeds
        seen += [visible(chunk, clock.reach(step)) for chunk, step in tick.steps.items()]
        rows["kv_range"].append([_bounds(chunks, setting["chunk_tokens"]) for chunks in seen])
        # a clean chunk has the learned text, the others the caption
        text = case.settings["caption_mask_length"]
        rows["caption_tokens"].append([50] * feeds + [text] * len(steps))
        rows["interval"].append(intervals[index])
        if index == 0:
            rows["chunk_start"].append(oldest)
            rows["chunk_end"].append(newest + 1)
            rows["t_start"].append(steps[-1] // clock.stage)
            rows["t_end"].append(steps[0] // clock.stage + 1)
        rows["emitted"] += [
            [tick.index, c, c - clip.num_given, len(clip.shown(c))] for c in tick.finishing
        ]
    if clip.num_given:
        given = [visible(chunk, clock.reach_given()) for chunk in range(clip.num_given)]
        rows["prefix_kv_range"] = [_bounds(chunks, setting["chunk_tokens"]) for chunks in given]
        rows["prefix_t"] = [setting["clean_t"]] * clip.num_given
    for table, values in rows.items():
        name = f"{setting['name']}.{table}"
        stored = case.tensor(name)
        tolerance = TABLE_TOLERANCE if stored.is_floating_point() else 0
        yield compare(name, _padded(values, like=stored), stored, tolerance=tolerance)


_SCHEDULE_TABLES = (
    *("step_scalars", "timestep_index", "t", "kv_range", "caption_tokens", "interval"),
    *("chunk_start", "chunk_end", "t_start", "t_end", "emitted"),
)


def _bounds(chunks: range, chunk_tokens: int) -> list[int]:
    return [chunks.start * chunk_tokens, chunks.stop * chunk_tokens]


def _padded(rows: list[Any], *, like: Tensor) -> Tensor:
    """Fill rows up to the reference's width."""
    padded = torch.full_like(like, PADDING)
    for row, values in zip(padded, rows, strict=True):
        filled = torch.tensor(values, dtype=like.dtype)
        if row.ndim:
            row[: len(filled)] = filled
        else:
            row.copy_(filled)
    return padded


def check_special_tokens(case: Case) -> Iterator[Check]:
    """Compare every chunk's text with special tokens before it, and the text that is none."""
    tokens, null = special_tokens(case), case.tensor("null_caption_embedding")
    text, mask = case.tensor("emb")[0, 0], case.tensor("mask")[0]
    head, tail = case.settings["emb_head"], case.settings["emb_tail"]
    length = case.settings["max_length"]
    for setting in case.settings["settings"]:
        name, num_given = setting["name"], setting["prefix_chunks"]
        num = setting["chunks"] - num_given
        fill = partial(
            chunk_captions,
            num_chunks=num,
            tokens=tokens,
            choice=choice_of(setting["flags"]),
            max_length=length,
        )
        texts = torch.stack([null] * num_given + fill(text)).unsqueeze(0)
        yield close(f"{name}.emb_head", texts[:, :, :head], case.tensor(f"{name}.emb_head"))
        yield close(f"{name}.emb_tail", texts[:, :, -tail:], case.tensor(f"{name}.emb_tail"))
        yield close(f"{name}.emb_sum", texts.sum(2), case.tensor(f"{name}.emb_sum"))
        num_tokens = [0] * num_given + [len(each) for each in fill(text[mask.bool()])]
        masks = torch.stack([torch.arange(length) < num for num in num_tokens]).long()
        yield compare(f"{name}.mask", masks[None], case.tensor(f"{name}.mask"), tolerance=0)
    masks = case.tensor("null.mask")
    ours = (torch.arange(length) < len(null_caption(null))).long().expand_as(masks)
    yield compare("null.mask", ours, masks, tolerance=0)
    negative = null_caption(null, tokens=tokens, choice=TokenChoice(negative=True))
    stored = case.tensor("neg.emb_head")
    yield close("neg.emb_head", negative[:head].expand_as(stored), stored)
    # four tokens in front push the last four out; the end is never attended to
    stored = case.tensor("neg.emb_tail")
    yield close("neg.emb_tail", null[-tail - 4 : -4].expand_as(stored), stored)


def check_prompts(case: Case) -> Iterator[Check]:
    """Compare cleaned prompts."""
    pairs = case.settings["pairs"]
    for key, ours in (("output", clean), ("once", clean_once)):
        found = {(pair["input"], ours(pair["input"])) for pair in pairs if key in pair}
        stored = {(pair["input"], pair[key]) for pair in pairs if key in pair}
        if stored:
            yield compare_sets(f"{len(stored)} prompts, {key}", found, stored)


# Clips --------------------------------------------------------------------------------------------


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


def check_clip_timesteps(case: Case, sampler: ClipSampler) -> Check:
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
    yield check_clip_timesteps(case, sampler)
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
    yield check_clip_timesteps(case, sampler)
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
        yield compare_sets(f"{name} (set)", by_head(indices), by_head(case.tensor(name)))
    for layer, cache in enumerate(caches):
        stored = case.tensor(f"kv_final.{layer}")
        ours = torch.cat([cache.kv[0], cache.kv[1]], dim=-1)[: cache.filled]
        name = f"kv_final.{layer}, {cache.filled} rows"
        yield relative(name, ours, stored[: cache.filled], tolerance=LOOP_TOLERANCE)


def _setting_has(case: Case, key: str) -> bool:
    """Return whether the settings are a list of entries with this key."""
    entries = case.settings.get("settings")
    return isinstance(entries, list) and bool(entries) and all(key in entry for entry in entries)


KINDS = (
    Kind("MAGI-1 base forward", lambda case: "out_cond" in case, check_base_forward),
    Kind(
        "MAGI-1 distilled forward", lambda case: case.has(".forward_out"), check_distilled_forward
    ),
    Kind("MAGI-1 8-bit layer", lambda case: case.has(".weight_bits"), check_fp8),
    Kind("MAGI-1 VAE", lambda case: "ddconfig" in case.settings, check_vae),
    Kind("MAGI-1 timesteps", lambda case: bool(case.names("interval.")), check_timesteps),
    Kind("MAGI-1 schedules", lambda case: _setting_has(case, "chunk_num"), check_schedules),
    Kind(
        "MAGI-1 special tokens",
        lambda case: _setting_has(case, "prepend_order"),
        check_special_tokens,
    ),
    Kind("MAGI-1 prompts", lambda case: "pairs" in case.settings, check_prompts),
    Kind("MAGI-1 loop", lambda case: "x_after" in case, check_loop),
    Kind("MAGI-1 FlowCache loop", lambda case: "x_stats" in case, check_reuse_loop),
)
"""Every kind of case file of this model."""
