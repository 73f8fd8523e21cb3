"""The files of a Wan 2.1 transformer, in both published layouts: sizes, names of the weights.

The original layout names settings and weights as `flowcache.wan.dit` does. diffusers' layout, a
folder `transformer` next to one per other network, has names of its own. Settings are read from
`config.json`; one that no released model changes is refused if it differs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flowcache.errors import UserError
from flowcache.runtime import profile
from flowcache.runtime.files import read_json
from flowcache.runtime.weights import (
    MAX_SIZE,
    WITHIN,
    Origin,
    check_files,
    load_files,
    match,
    read,
    read_model_config,
    rename,
)
from flowcache.wan.dit import CLIP_WIDTH, DiT, DiTConfig

Layout = Literal["original", "diffusers"]

MAX_TEXT_LEN = 512
"""Prompt tokens of every released model."""

_SIZES = ("in_dim", "out_dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")
_ORIGINAL_NAMES = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
}
"""Setting in `transformer/config.json` -> setting in the original `config.json`."""

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


def diffusers_key(key: str) -> str:
    """Translate an original key of the transformer to diffusers' layout."""
    return rename(key, _DIFFUSERS_KEYS)


@dataclass(frozen=True)
class DiTFiles:
    """The weights of a transformer on the disk; loading and checking keep nothing of them.

    Attributes:
        files: shards, or one file.
        within: names under which a file may hold the weights, see `weights.read`.
    """

    config: DiTConfig
    files: tuple[Path, ...]
    layout: Layout
    within: tuple[str, ...] = WITHIN

    def check(self) -> None:
        """Check that the weights are there, whole, and fit; reads headers only."""
        check_files(self._empty(), self.files, origin=self._origin, within=self.within)

    def fingerprint(self) -> str:
        """Return a hash, see `profile.fingerprint`; little of the files is read."""
        weights = match(self._empty(), read(self.files, within=self.within), origin=self._origin)
        named = ((names[0], tensor) for names, tensor in weights)
        return profile.fingerprint(asdict(self.config), named)

    def load(
        self, *, dtype: torch.dtype | None, device: torch.device | str, kind: type[DiT] = DiT
    ) -> DiT:
        """Load the transformer, for inference.

        Args:
            dtype: type of the weights; None keeps each as stored.
            kind: of transformer that is made.
        """
        dit = self._empty(kind)
        load_files(
            dit, self.files, origin=self._origin, within=self.within, dtype=dtype, device=device
        )
        return dit

    def _empty(self, kind: type[DiT] = DiT) -> DiT:
        with torch.device("meta"):
            return kind(self.config)

    def _origin(self, name: str) -> Origin:
        return Origin(name if self.layout == "original" else diffusers_key(name))


# Settings -----------------------------------------------------------------------------------------


def read_original(path: Path) -> DiTConfig:
    """Read `config.json` of the original layout."""
    values = read_model_config(path)
    # the original model class never saves these; a file that does must agree
    _require(values, path, patch_size=[1, 2, 2], qk_norm=True, cross_attn_norm=True)
    _require(values, path, window_size=[-1, -1])
    names = (*_SIZES, "dim", "model_type", "text_dim", "text_len", "inject_sample_info", "eps")
    given = {name: values[name] for name in names if name in values}
    is_i2v = given.get("model_type") == "i2v"
    return _checked(DiTConfig(**given, image_dim=CLIP_WIDTH if is_i2v else None), path)


def read_diffusers(path: Path, *, text_len: int) -> DiTConfig:
    """Read `transformer/config.json`."""
    values = read_model_config(path)
    _require(values, path, patch_size=[1, 2, 2], qk_norm="rms_norm_across_heads")
    _require(values, path, cross_attn_norm=True, pos_embed_seq_len=None)
    given = {_ORIGINAL_NAMES.get(name, name): value for name, value in values.items()}
    names = (*_SIZES, "text_dim", "image_dim", "inject_sample_info", "eps")
    given = {name: given[name] for name in names if name in given}
    # 128: of every released model
    head_width = values.get("attention_head_dim", 128)
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


def text_len(tokenizer: Path) -> int:
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
    """Return a parsed config, refusing types and ranges that the model can't have."""
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


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path, advice="download it again")
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected a JSON object")
    return values
