"""Find a SkyReels-V2 checkpoint and load its transformer, in both published layouts.

The original layout is one flat folder; the `*-Diffusers` layout has a folder per part. Which one it
is, and which model, is read from the files, never from the name of the folder.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from flowcache.attention import SDPA, Kernel
from flowcache.errors import UserError
from flowcache.runtime import profile
from flowcache.runtime.files import read_json
from flowcache.runtime.hub import HUB, Hub, Missing, fetch, find_missing, local_copy
from flowcache.runtime.tokenizer import tokenizer_files
from flowcache.runtime.weights import (
    MAX_SIZE,
    Origin,
    check_files,
    find_shards,
    load_files,
    match,
    read,
    read_model_config,
    rename,
)
from flowcache.wan import text, vae
from flowcache.wan.dit import DiT, DiTConfig

MAX_TEXT_LEN = 512
"""Prompt tokens of every released model."""
CLIP_WIDTH = 1280
"""Width of the image features of every released I2V model; the original config leaves it out."""

HEAD_WIDTH = 128
"""Width of an attention head of every released model."""

_SIZES = ("in_dim", "out_dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")
_ORIGINAL_NAMES = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
}
"""Setting in `transformer/config.json` -> setting in the original `config.json`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_VAE_FILE = "Wan2.1_VAE.pth"
_TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
_TOKENIZER_FOLDER = "google/umt5-xxl"
_IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"

# Original key -> key of the `*-Diffusers` layout; applied one after the other.
# Source: the two published layouts of the same weights.
_DIFFUSERS_KEYS = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"(^fps_projection|\.ffn)\.0\.", r"\1.net.0.proj."),
    (r"(^fps_projection|\.ffn)\.2\.", r"\1.net.2."),
    (r"\.norm3\.", ".norm2."),
    (r"(_attn)\.([qkv])\.", r"\1.to_\2."),
    (r"(_attn)\.o\.", r"\1.to_out.0."),
    (r"(_attn)\.([kv])_img\.", r"\1.add_\2_proj."),
    (r"(_attn)\.norm_k_img\.", r"\1.norm_added_k."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
)


def released_sizes(name: str) -> DiTConfig:
    """Return the sizes of a released model, which plan a run without its files.

    Source: the `config.json` files of the released checkpoints.
    """
    sizes = DiTConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
    if "-1.3b-" in name:
        sizes = DiTConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
    if name.startswith("i2v-"):
        return replace(sizes, model_type="i2v", in_dim=36, image_dim=CLIP_WIDTH)
    return replace(sizes, inject_sample_info=name == "df-1.3b-540p")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose parts are all there.

    Attributes:
        layout: how the files are laid out and named.
        folder: the checkpoint's folder.
        config: sizes of the transformer.
        dit_files: the transformer's weights.
        vae: VAE, folder or file.
        text_encoder: UMT5 encoder, folder or file.
        tokenizer: tokenizer folder.
        image_encoder: CLIP vision tower, folder or file; None unless the model is I2V.
    """

    layout: Literal["original", "diffusers"]
    folder: Path
    config: DiTConfig
    dit_files: tuple[Path, ...]
    vae: Path
    text_encoder: Path
    tokenizer: Path
    image_encoder: Path | None

    @property
    def is_i2v(self) -> bool:
        """Whether the transformer takes a start image (I2V, not diffusion forcing)."""
        return self.config.model_type == "i2v"


def find(model: str | Path, *, hub: Hub = HUB) -> Checkpoint:
    """Find a checkpoint: a local folder, or else a hub id, whose local copy or download is used.

    Raises:
        UserError: if there is neither, or the folder holds no complete checkpoint.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = fetch(_hub_id(model), is_whole=_is_whole, hub=hub)
    return _find_in(folder)


def find_download(model: str | Path, *, hub: Hub = HUB) -> Missing | None:
    """Return what `find` would download; None: nothing, the model is on the disk.

    Raises:
        UserError: it is not to be had, or the disk has no room for it.
    """
    if Path(model).expanduser().exists():
        return None
    repository = _hub_id(model)
    if local_copy(repository, is_whole=_is_whole, hub=hub) is not None:
        return None
    missing = find_missing(repository, hub=hub)
    missing.check_room()
    return missing


def _hub_id(model: str | Path) -> str:
    if not _HUB_ID.fullmatch(str(model)):
        raise UserError(f"{model}: no such folder; give a checkpoint's folder or a hub id ORG/NAME")
    return str(model)


def _find_in(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the checkpoint's folder")
    if (folder / "transformer" / "config.json").is_file():
        return _find_diffusers(folder)
    if (folder / "config.json").is_file():
        return _find_original(folder)
    raise UserError(
        f"{folder}: no SkyReels-V2 checkpoint; it must hold transformer/config.json (*-Diffusers"
        " layout) or config.json (original layout)"
    )


def _is_whole(folder: Path) -> bool:
    """Whether no file of a checkpoint is missing."""
    try:
        found = _find_in(folder)
        tokenizer_files(found.tokenizer)
        for part in (found.vae, found.text_encoder, found.image_encoder):
            if part is not None and part.is_dir():
                read_model_config(part / "config.json")
                find_shards(part)
    except UserError:
        return False
    return True


def _find_original(folder: Path) -> Checkpoint:
    config = _parse_original(folder / "config.json")
    is_i2v = config.model_type == "i2v"
    return Checkpoint(
        layout="original",
        folder=folder,
        config=config,
        dit_files=find_shards(folder),
        vae=_part(folder, _VAE_FILE),
        text_encoder=_part(folder, _TEXT_ENCODER_FILE),
        tokenizer=_part(folder, _TOKENIZER_FOLDER),
        image_encoder=_part(folder, _IMAGE_ENCODER_FILE) if is_i2v else None,
    )


def _find_diffusers(folder: Path) -> Checkpoint:
    tokenizer = _part(folder, "tokenizer")
    config = _parse_diffusers(folder / "transformer" / "config.json", text_len=_text_len(tokenizer))
    is_i2v = config.model_type == "i2v"
    return Checkpoint(
        layout="diffusers",
        folder=folder,
        config=config,
        dit_files=find_shards(folder / "transformer"),
        vae=_part(folder, "vae"),
        text_encoder=_part(folder, "text_encoder"),
        tokenizer=tokenizer,
        image_encoder=_part(folder, "image_encoder") if is_i2v else None,
    )


def _part(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise UserError(f"{path}: is missing; the checkpoint is not complete, download it again")
    return path


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path, advice="download it again")
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected a JSON object")
    return values


def _text_len(tokenizer: Path) -> int:
    """Return the prompt tokens that the model takes: the tokenizer's limit, at most 512."""
    path = tokenizer / "tokenizer_config.json"
    # transformers writes 1e30 (a float) where a tokenizer has no limit
    limit = _read_object(path).get("model_max_length", MAX_TEXT_LEN)
    if not isinstance(limit, int | float) or limit < 1:
        raise UserError(f"{path}: model_max_length is {limit!r}, expected a number of tokens >= 1")
    return int(min(limit, MAX_TEXT_LEN))


def _require(values: Mapping[str, Any], path: Path, **supported: Any) -> None:
    """Refuse a setting other than the one that all released models share."""
    for key, wanted in supported.items():
        found = values.get(key, wanted)
        if found != wanted:
            raise UserError(f"{path}: {key} is {found!r}, only {wanted!r} is supported")


def _checked(config: DiTConfig, path: Path) -> DiTConfig:
    """Check the settings of a parsed config.

    Raises:
        UserError: if one has another type or range than the model can have.
    """
    rules: dict[str, tuple[bool, str]] = {}
    for name in (*_SIZES, "dim", "text_dim", "text_len", "image_dim"):
        value = getattr(config, name)
        may_lack = name == "image_dim" and value is None
        rules[name] = (may_lack or _is_size(value), "an integer >= 1")
    rules["model_type"] = (config.model_type in ("t2v", "i2v"), "t2v or i2v")
    rules["inject_sample_info"] = (config.inject_sample_info in (True, False), "true or false")
    rules["eps"] = (isinstance(config.eps, float) and config.eps > 0, "a number > 0")
    for name, (is_met, rule) in rules.items():
        if not is_met:
            raise UserError(f"{path}: {name} is {getattr(config, name)!r}, expected {rule}")
    if config.dim > MAX_SIZE:
        raise UserError(
            f"{path}: the heads make a width of {config.dim}, at most {MAX_SIZE} expected"
        )
    if config.dim % config.num_heads:
        raise UserError(f"{path}: {config.num_heads} heads do not divide the width {config.dim}")
    return config


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _parse_original(path: Path) -> DiTConfig:
    """Read `config.json` of the original layout."""
    values = read_model_config(path)
    # the original model class never saves these; a file that does must agree
    _require(values, path, patch_size=[1, 2, 2], qk_norm=True, cross_attn_norm=True)
    _require(values, path, window_size=[-1, -1])
    names = (*_SIZES, "dim", "model_type", "text_dim", "text_len", "inject_sample_info", "eps")
    given = {name: values[name] for name in names if name in values}
    is_i2v = given.get("model_type") == "i2v"
    return _checked(DiTConfig(**given, image_dim=CLIP_WIDTH if is_i2v else None), path)


def _parse_diffusers(path: Path, *, text_len: int) -> DiTConfig:
    """Read `transformer/config.json`."""
    values = read_model_config(path)
    _require(values, path, patch_size=[1, 2, 2], qk_norm="rms_norm_across_heads")
    _require(values, path, cross_attn_norm=True, pos_embed_seq_len=None)
    given = {_ORIGINAL_NAMES.get(name, name): value for name, value in values.items()}
    names = (*_SIZES, "text_dim", "image_dim", "inject_sample_info", "eps")
    given = {name: given[name] for name in names if name in given}
    head_width = values.get("attention_head_dim", HEAD_WIDTH)
    if not _is_size(head_width):
        raise UserError(f"{path}: attention_head_dim is {head_width!r}, expected an integer >= 1")
    num_heads = given.get("num_heads", DiTConfig.num_heads)
    config = DiTConfig(
        **given,
        model_type="t2v" if given.get("image_dim") is None else "i2v",
        text_len=text_len,
        # a number of heads that is none is refused below
        dim=num_heads * head_width if _is_size(num_heads) else head_width,
    )
    return _checked(config, path)


def diffusers_key(key: str) -> str:
    """Translate an original key of the transformer to the `*-Diffusers` layout.

    Example: `blocks.3.cross_attn.k_img.bias` is `blocks.3.attn2.add_k_proj.bias` there, and the
    norm before cross-attention, `norm3`, is called `norm2`.
    """
    return rename(key, _DIFFUSERS_KEYS)


def _diffusers_origin(name: str) -> Origin:
    return Origin(diffusers_key(name))


def _origin(checkpoint: Checkpoint) -> Callable[[str], Origin]:
    return Origin if checkpoint.layout == "original" else _diffusers_origin


def _empty_dit(config: DiTConfig, kernel: Kernel = SDPA) -> DiT:
    with torch.device("meta"):
        return DiT(config, kernel=kernel)


def check(checkpoint: Checkpoint) -> None:
    """Check that the weights of all parts are there, whole, and fit; reads headers only.

    Raises:
        UserError: naming the file and the key.
    """
    origin = _origin(checkpoint)
    check_files(_empty_dit(checkpoint.config), checkpoint.dit_files, origin=origin)
    vae.check(checkpoint.vae)
    config = checkpoint.config
    text.check_encoder(
        checkpoint.text_encoder, tokenizer=checkpoint.tokenizer, width=config.text_dim
    )
    if checkpoint.image_encoder is not None:
        text.check_vision(checkpoint.image_encoder, width=config.image_dim)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of the transformer, see `profile.fingerprint`; little of the files is read."""
    weights = match(
        _empty_dit(checkpoint.config), read(checkpoint.dit_files), origin=_origin(checkpoint)
    )
    return profile.fingerprint(
        asdict(checkpoint.config), ((names[0], tensor) for names, tensor in weights)
    )


def load_dit(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    kernel: Kernel = SDPA,
) -> DiT:
    """Load the transformer, for inference.

    Args:
        dtype: type of the weights; None keeps each as stored.
        kernel: how the transformer attends.

    Raises:
        UserError: naming the file and the key, if the files do not fit the config.
    """
    dit = _empty_dit(checkpoint.config, kernel)
    origin = _origin(checkpoint)
    load_files(dit, checkpoint.dit_files, origin=origin, dtype=dtype, device=device)
    return dit
