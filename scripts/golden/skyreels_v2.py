"""The reference cases of SkyReels-V2: schedules, transformer, encoders, KV scores, loops."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from flowcache.compress import (
    ImportanceRedundancy,
    TokenLayout,
    gather,
)
from flowcache.schedule import Tick, staggered
from flowcache.scores import (
    importance,
    redundancy,
)
from flowcache.wan import text, vae
from flowcache.wan.unipc import UniPC, timestep_grid
from golden.case import Case, Check, Kind, by_head, compare, compare_sets
from golden.skyreels_v2_loops import (
    build_dit,
    check_df_loop,
    check_fork_segment,
    check_long_video,
    check_teacache,
    fps_of,
)

FORWARD_TOLERANCE = 1e-4
"""Of float32 values up to 6; with other vector widths of the processor they differ by 1e-5."""
SCORE_TOLERANCE = 1e-6
"""Of float32 values up to 1: eight of their last bits."""
SOLVER_TOLERANCE = 1e-5
"""Of the UniPC trajectory on given velocities, and of the sigmas."""


def check_dit(case: Case) -> Iterator[Check]:
    """Compare forwards: `full`, `frames` and `scalar` without a mask, `ar` block-causal."""
    dit = build_dit(case, image_dim=case.settings.get("image_feature_dim"))
    x, context = case.tensor("in.x"), case.tensor("in.context")
    num_frames = x.shape[2]
    given = {}
    if "in.y" in case:
        given = {"y_BCFhw": case.tensor("in.y"), "image_BLD": case.tensor("in.clip")}
    context = functional.pad(context, (0, 0, 0, dit.config.text_len - context.shape[1]))
    for name in case.names("out."):
        _, form, *rest = name.split(".")
        t = case.tensor({"scalar": "in.t_scalar", "frames": "in.t_frames"}.get(form, "in.t"))
        chunks = None
        if form == "ar":
            size = case.settings["ar_block"]
            chunks = [(a, min(a + size, num_frames)) for a in range(0, num_frames, size)]
        flag = int(rest[0].removeprefix("fps")) if rest else 1
        ours = dit(
            x,
            t if t.ndim == 2 else t.unsqueeze(1).expand(-1, num_frames),
            context,
            fps=[fps_of(flag)] * len(x),
            causal_chunks=chunks,
            **given,
        )
        yield compare(name, ours, case.tensor(name), tolerance=FORWARD_TOLERANCE)


def check_schedule(case: Case) -> Iterator[Check]:
    """Compare noise levels, and UniPC's path along given velocities."""
    for entry in case.settings["sets"]:
        name, num_steps, shift = entry["i"], entry["N"], entry["shift"]
        timesteps, sigmas = timestep_grid(num_steps, shift=shift)
        stored = partial(_stored, case, name)
        yield compare(
            f"{name}.timesteps", torch.tensor(timesteps), stored("timesteps"), tolerance=0
        )
        ours = torch.tensor(sigmas)
        yield compare(f"{name}.sigmas", ours, stored("sigmas"), tolerance=SOLVER_TOLERANCE)
        trajectory, velocities = stored("trajectory"), stored("velocity")
        solver, path = UniPC(num_steps, shift=shift), [trajectory[0]]
        for velocity in velocities:
            path.append(solver.step(velocity, sample=path[-1]))
        yield compare(
            f"{name}.trajectory", torch.stack(path), trajectory, tolerance=SOLVER_TOLERANCE
        )


def check_step_matrix(case: Case) -> Iterator[Check]:
    """Compare which chunk takes which step when, and the settings that are rejected."""
    for entry in case.settings["sets"]:
        name, num_steps, size = entry["i"], entry["N"], entry["causal_block_size"]
        stored = partial(_stored, case, name)
        timesteps, _ = timestep_grid(num_steps, shift=entry["shift"])
        template = torch.tensor(timesteps)
        yield compare(f"{name}.template", template, stored("template"), tolerance=0)
        num_chunks, given = entry["num_latent_frames"] // size, entry["num_pre_ready"] // size
        ticks = staggered(range(given, num_chunks), num_steps=num_steps, lag=entry["ar_step"])
        intervals = _visible_intervals(
            ticks, num_chunks=num_chunks, window=entry["base"] // size, lag=entry["ar_step"]
        )
        is_rejected = intervals is None
        yield compare_sets(f"{name}.raises", {is_rejected}, {entry["raises"]})
        if intervals is None or entry["raises"]:
            continue
        index = _level_index(ticks, num_chunks=num_chunks, given=given).repeat_interleave(size, 1)
        update = torch.tensor(
            [[int(chunk in tick.steps) for chunk in range(num_chunks)] for tick in ticks]
        ).repeat_interleave(size, 1)
        levels = torch.tensor([999, *timesteps, 0])
        interval = torch.tensor([[i.start * size, i.stop * size] for i in intervals])
        yield compare(f"{name}.index", index, stored("index"), tolerance=0)
        yield compare(f"{name}.update", update, stored("update"), tolerance=0)
        yield compare(f"{name}.timesteps", levels[index], stored("timesteps"), tolerance=0)
        yield compare(f"{name}.interval", interval, stored("interval"), tolerance=0)


def _visible_intervals(
    ticks: Sequence[Tick], *, num_chunks: int, window: int, lag: int
) -> list[range] | None:
    """Return the chunks that a sliding window shows at each tick; None: it can't hold the active.

    The window starts at chunk 0 and moves on by one in the tick in which the chunk after it starts.
    """
    if ticks and window < num_chunks and window * lag < ticks[0].num_steps:
        return None
    end, intervals = min(window, num_chunks), list[range]()
    for tick in ticks:
        end += end in tick.steps
        intervals.append(range(max(end - window, 0), end))
    return intervals


def _stored(case: Case, name: object, part: str) -> Tensor:
    return case.tensor(f"{name}.{part}")


def _level_index(ticks: list[Tick], *, num_chunks: int, given: int) -> Tensor:
    """Return for every tick and chunk 0 (waiting), own step + 1, or N + 1 (clean)."""
    rows, clean = [], set(range(given))
    for tick in ticks:
        done = tick.num_steps + 1
        rows.append(
            [
                done if chunk in clean else tick.steps.get(chunk, -1) + 1
                for chunk in range(num_chunks)
            ]
        )
        clean.update(tick.finishing)
    return torch.tensor(rows)


def check_kv_compress(case: Case) -> Iterator[Check]:
    """Compare scores, kept tokens and what is left of keys and values."""
    for entry in case.settings["cases"]:
        name, num_clean = entry["name"], entry["clean_tokens"]
        k, v, q = (_stored(case, entry["inputs"], part) for part in "kvq")
        is_token = entry["strategy"] == "token"
        frame_tokens = entry.get("frame_tokens") or entry.get("h", 1) * entry.get("w", 1)
        layout = TokenLayout(frame_tokens, entry.get("T", 1) * frame_tokens)
        strategy = ImportanceRedundancy(
            mix=entry["mix_lambda"],
            kernel=entry["kernel_size"],
            granularity=entry["strategy"],
            queries=entry["query_granularity"],
            weighting=entry["weighting"] if is_token else "none",
            power=entry.get("power", 3),
            order="score",
        )
        seen = strategy.seen_queries(q, layout)
        score = strategy.score(q, k[:num_clean], layout=layout)
        if is_token and entry["weighting"] == "no_weight":
            # the reference shifts every head's scores to a minimum of 0, which ranks them the same
            score = score - score.amin(dim=1, keepdim=True)
        parts = {
            "importance_unpooled": importance(seen, k[:num_clean], kernel=1),
            "importance": importance(seen, k[:num_clean], kernel=entry["kernel_size"]),
            "redundancy": redundancy(k[:num_clean]),
            "score": score,
        }
        for part, ours in parts.items():
            if f"{name}.{part}" in case:
                stored = _stored(case, name, part)
                yield compare(f"{name}.{part}", ours, stored, tolerance=SCORE_TOLERANCE)
        kept, indices = (
            strategy.keep(q, k[:num_clean], budget=entry["budget"], layout=layout),
            _stored(case, name, "indices"),
        )
        yield compare_sets(f"{name}.indices", by_head(kept), by_head(indices))
        for part, full in (("k_out", k), ("v_out", v)):
            if f"{name}.{part}" in case:
                ours = torch.cat([gather(full[:num_clean], indices), full[num_clean:]])
                yield compare(f"{name}.{part}", ours, _stored(case, name, part), tolerance=0)


def check_vae(case: Case) -> Iterator[Check]:
    """Compare encoding, decoding and normalisation, loaded from the original layout."""
    with tempfile.TemporaryDirectory() as folder:
        model = vae.load(_write_weights(case, Path(folder)), device="cpu")
    config = model.model.config
    for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
        stored = case.tensor(f"scale.{name}")
        yield compare(f"scale.{name}", torch.tensor(values), stored, tolerance=0)
    video = case.tensor("in.video")
    # the reference drops frames that don't fill a latent, ours refuses them
    used = (case.settings["remainder_frames"] - 1) // vae.TEMPORAL_STRIDE * vae.TEMPORAL_STRIDE + 1
    decoded = model.decode(case.tensor("in.latent"))
    pairs = {
        "out.latent": model.encode(video),
        "out.latent_remainder": model.encode(torch.cat([video, video], dim=2)[:, :, :used]),
        "out.video": decoded,
        "out.roundtrip": model.decode(case.tensor("out.latent")),
    }
    for name, ours in pairs.items():
        yield compare(name, ours, case.tensor(name), tolerance=FORWARD_TOLERANCE)
    clamped = case.tensor("out.video_unclamped").clamp(-1, 1)
    yield compare("out.video_unclamped, clamped", decoded, clamped, tolerance=FORWARD_TOLERANCE)


def check_umt5(case: Case) -> Iterator[Check]:
    """Compare the text encoder, loaded from the original layout."""
    ids, mask = case.tensor("in.ids"), case.tensor("in.mask")
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "tokenizer"
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>")),
            pad_token="<pad>",
        ).save_pretrained(words)
        path = _write_weights(case, Path(folder))
        encoder = text.load_encoder(
            path, tokenizer=words, text_len=ids.shape[1], dtype=torch.float32, device="cpu"
        )
    ours = text.encode_tokens(encoder.model, ids, mask_BL=mask)
    stored = case.tensor("out.hidden") * mask.unsqueeze(-1)  # the other rows mean nothing
    yield compare("out.hidden", ours, stored, tolerance=FORWARD_TOLERANCE)
    yield compare("out.masked", ours, case.tensor("out.masked"), tolerance=FORWARD_TOLERANCE)


def check_clip(case: Case) -> Iterator[Check]:
    """Compare the image encoder and its preprocessing, loaded from the original layout."""
    with tempfile.TemporaryDirectory() as folder:
        path = _write_weights(case, Path(folder))
        encoder = text.load_vision(
            path,
            num_heads=case.settings["config"]["num_heads"],
            dtype=torch.float32,
            device="cpu",
        )
    image = case.tensor("in.video")[:, :, 0]
    pixels, features = case.tensor("out.pixels"), case.tensor("out.features")
    yield compare("out.pixels", encoder.prepare(image), pixels, tolerance=FORWARD_TOLERANCE)
    yield compare("out.features", encoder.encode(image), features, tolerance=FORWARD_TOLERANCE)


def _write_weights(case: Case, folder: Path) -> Path:
    """Write the weights as an original checkpoint file."""
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in case.weights().items()}, path)
    return path


def _config(case: Case) -> dict[str, object]:
    config = case.settings.get("config")
    return config if isinstance(config, dict) else {}


def _entries(case: Case, key: str) -> list[dict[str, object]]:
    """Return the entries of a list in the settings that are objects."""
    entries = case.settings.get(key)
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def _is_dit(case: Case) -> bool:
    return "model_type" in _config(case) and "in.x" in case and bool(case.names("out."))


def _is_loop(case: Case) -> bool:
    return "model_type" in _config(case) and bool(_entries(case, "runs"))


def _has(entries: list[dict[str, object]], *keys: str) -> bool:
    return bool(entries) and all(key in entry for entry in entries for key in keys)


def _arguments(case: Case) -> dict[str, object]:
    found = case.settings.get("args")
    return found if isinstance(found, dict) else {}


KINDS = (
    Kind("DiT forward", _is_dit, check_dit),
    Kind(
        "noise schedule",
        lambda case: _has(_entries(case, "sets"), "N", "shift") and case.has(".trajectory"),
        check_schedule,
    ),
    Kind(
        "step matrix",
        lambda case: _has(_entries(case, "sets"), "ar_step", "num_pre_ready", "raises"),
        check_step_matrix,
    ),
    Kind(
        "diffusion forcing loop",
        lambda case: _is_loop(case) and _has(_entries(case, "runs"), "causal_mask_block", "N"),
        check_df_loop,
    ),
    Kind(
        "upstream TeaCache",
        lambda case: _is_loop(case) and case.has(".computed"),
        check_teacache,
    ),
    Kind(
        "first segment of the fork",
        lambda case: _is_loop(case) and "num_latent_frames" in _arguments(case),
        check_fork_segment,
    ),
    Kind(
        "long video",
        lambda case: _is_loop(case) and "base_num_frames" in _arguments(case),
        check_long_video,
    ),
    Kind(
        "KV compression",
        lambda case: _has(_entries(case, "cases"), "clean_tokens", "mix_lambda", "budget"),
        check_kv_compress,
    ),
    Kind("Wan VAE", lambda case: "dim_mult" in _config(case) and "scale.mean" in case, check_vae),
    Kind("UMT5", lambda case: "num_buckets" in _config(case) and "in.ids" in case, check_umt5),
    Kind(
        "CLIP vision",
        lambda case: "patch_size" in _config(case) and case.has("out.features"),
        check_clip,
    ),
)
"""Every kind of case file of this model."""
