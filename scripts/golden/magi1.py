"""The reference cases of MAGI-1: transformer, 8-bit layers, VAE, tables, text, prompts."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowcache.kv import Attend
from golden.case import Case, Check, Kind, compare, compare_sets
from golden.magi1_loops import (
    build_dit,
    check_loop,
    check_reuse_loop,
    choice_of,
    relative,
    special_tokens,
    step_width_of,
)
from magi1.config import TokenChoice
from magi1.dit import DiT
from magi1.fp8 import FP8, Fp8Linear, SmoothFp8Linear, emulated_product
from magi1.schedule import Clip, Clock, interval_table, timestep_table, visible
from magi1.text import chunk_captions, clean, clean_once, null_caption
from magi1.vae import VAE, Tiling, ViTVAE, parse_config

UNIT_TOLERANCE = 5e-5
"""Of one forward, relative to the largest reference value."""
TABLE_TOLERANCE = 5e-7
"""Of float32 values up to 1: four of their last bits."""
WIDTH = 6
"""Latents of a chunk in every case."""
PADDING = -1

close = partial(relative, tolerance=UNIT_TOLERANCE)


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
            step_width=step_width_of(call["num_steps"], call["distill_interval"]),
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
        width = step_width_of(num_steps, interval)
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
