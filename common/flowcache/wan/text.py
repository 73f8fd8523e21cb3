"""The encoders of Wan 2.1 models: the prompt through UMT5, the start image through CLIP.

Axes: B batch, L prompt tokens, P image tokens (class token, then patches), D width.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional

from flowcache.errors import UserError
from flowcache.runtime import profile
from flowcache.runtime.embeddings import hash_files, load_tokenizer, tokenizer_files, warn_if_cut
from flowcache.runtime.weights import (
    Origin,
    check_files,
    find_shards,
    load_files,
    match,
    read,
    read_model_config,
    rename,
)

# Seconds to import: where nothing is encoded, as for --help, they are never loaded.
if TYPE_CHECKING:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        UMT5Config,
        UMT5EncoderModel,
    )

CLIP_HEADS = 16
"""Attention heads of the released CLIP tower (ViT-H/14); its file does not say."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of the RGB values CLIP was trained on. Source: arXiv 2103.00020, its code."""
RELEASED_VISION_WEIGHTS = 632_076_800
"""Parameters of the released CLIP tower (ViT-H/14), its projection included."""

# Name in transformers -> key in the original file; applied one after the other.
# Source: the original and the transformers release of the same weights.
_UMT5_KEYS = (
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.layer\.", r"blocks.\1."),
    (r"\.0\.layer_norm\.", ".norm1."),
    (r"\.1\.layer_norm\.", ".norm2."),
    (r"\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.0\.SelfAttention\.", ".attn."),
    (r"\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)
_CLIP_KEYS = (
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.patch_embedding."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.cls_embedding"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.pos_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.pre_norm."),
    (r"^vision_model\.post_layernorm\.", "visual.post_norm."),
    (r"^visual_projection\.weight$", "visual.head"),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.to_qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
)


def clean_prompt(prompt: str) -> str:
    """Fix broken Unicode, undo HTML escapes (also doubled ones), and make blanks single spaces.

    Example: `"a  caf&amp;eacute;\\n"` becomes `"a café"`.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class TextEncoder:
    """UMT5 with its tokenizer: prompts to what the transformer attends to."""

    def __init__(
        self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, *, text_len: int
    ) -> None:
        # Any: transformers types its methods as untyped wrappers
        self.model: Any = model
        self._tokenizer = tokenizer
        self._text_len = text_len

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights; returns the encoder itself."""
        self.model.to(device)
        return self

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt, cleaned, with the end token; more than text_len are cut."""
        return len(self._tokenizer(clean_prompt(prompt), verbose=False).input_ids)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to `[B, L, D]` in the weights' dtype; the rows of padding are zero.

        A prompt longer than `text_len` tokens is cut, with a warning that says by how much.
        """
        for prompt in prompts:
            warn_if_cut(prompt, self.count_tokens(prompt), most=self._text_len)
        tokens = self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self._text_len,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encode_tokens(self.model, tokens.input_ids, mask_BL=tokens.attention_mask)


@torch.no_grad()
def encode_tokens(model: UMT5EncoderModel, ids_BL: Tensor, *, mask_BL: Tensor) -> Tensor:
    """Encode token ids to `[B, L, D]`; rows whose mask is 0 are exactly zero.

    The transformer attends to the zero rows too: it was trained that way.
    """
    ids, mask = ids_BL.to(model.device), mask_BL.to(model.device)
    hidden_BLD = model(input_ids=ids, attention_mask=mask).last_hidden_state
    # not a product: the padding's own rows may hold anything
    return hidden_BLD.masked_fill(mask.unsqueeze(-1) == 0, 0)


class VisionEncoder:
    """CLIP's vision tower: the start image to what an I2V transformer attends to."""

    def __init__(self, model: CLIPVisionModelWithProjection) -> None:
        self.model: Any = model

    def prepare(self, image_B3HW: Tensor) -> Tensor:
        """Resize an image in -1..1 to CLIP's square, aspect not kept, and normalise it (float32).

        Source: the released code of Wan 2.1, which is bicubic without antialiasing; the image
        processor of transformers differs.
        """
        size = self.model.config.image_size
        image = functional.interpolate(
            image_B3HW.float(), size=(size, size), mode="bicubic", align_corners=False
        )
        mean = image.new_tensor(CLIP_MEAN).view(3, 1, 1)
        std = image.new_tensor(CLIP_STD).view(3, 1, 1)
        return (image * 0.5 + 0.5 - mean) / std

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Encode an image in -1..1 to features `[B, P, D]`: the output of all blocks but one."""
        pixels = self.prepare(image_B3HW).to(device=self.model.device, dtype=self.model.dtype)
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


# Files --------------------------------------------------------------------------------------------


def umt5_key(name: str) -> str:
    """Translate a name of transformers' UMT5 encoder to the key in the original file."""
    return rename(name, _UMT5_KEYS)


def clip_origin(name: str) -> Origin:
    """Say which tensor of the original CLIP file, and which part of it, fills a parameter.

    Queries, keys and values are one tensor there, in this order; the projection is transposed.
    """
    key = rename(name, _CLIP_KEYS)
    if found := re.search(r"\.([qkv])_proj\.", name):
        part = "qkv".index(found[1])
        return Origin(key, lambda tensor: tensor.tensor_split(3)[part])
    if key == "visual.cls_embedding":
        return Origin(key, lambda tensor: tensor[0, 0])
    if key == "visual.pos_embedding":
        return Origin(key, lambda tensor: tensor[0])
    if key == "visual.head":
        return Origin(key, lambda tensor: tensor.T)
    return Origin(key)


def _is_not_visual(key: str) -> bool:
    """Whether a key of the original CLIP file belongs to its unused text side."""
    return not key.startswith("visual.")


def _is_position_table(key: str) -> bool:
    """Whether a key is the table 0, 1, 2, ... that older versions of transformers saved."""
    return key.endswith("embeddings.position_ids")


def _shapes(path: Path) -> dict[str, torch.Size]:
    return {stored.key: stored.tensor.shape for stored in read([path])}


def _count(shapes: Mapping[str, torch.Size], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in shapes)


def _umt5_config(path: Path) -> UMT5Config:
    """Derive the config of an original UMT5 file from its shapes."""
    from transformers import UMT5Config

    shapes = _shapes(path)
    try:
        vocab_size, width = shapes["token_embedding.weight"]
        num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        return UMT5Config(
            vocab_size=vocab_size,
            d_model=width,
            d_kv=shapes["blocks.0.attn.q.weight"][0] // num_heads,
            d_ff=shapes["blocks.0.ffn.gate.0.weight"][0],
            num_layers=_count(shapes, r"blocks\.\d+\.attn\.q\.weight"),
            num_heads=num_heads,
            relative_attention_num_buckets=num_buckets,
        )
    except (KeyError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{path}: not a UMT5 encoder: {_reason(error)}") from error


def _clip_config(path: Path, *, num_heads: int) -> CLIPVisionConfig:
    """Derive the config of an original CLIP file from its shapes."""
    from transformers import CLIPVisionConfig

    shapes = _shapes(path)
    try:
        width, _, patch, _ = shapes["visual.patch_embedding.weight"]
        num_patches = shapes["visual.pos_embedding"][1] - 1
        return CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=shapes["visual.transformer.0.mlp.0.weight"][0],
            projection_dim=shapes["visual.head"][1],
            num_hidden_layers=_count(shapes, r"visual\.transformer\.\d+\.attn\.to_qkv\.weight"),
            num_attention_heads=num_heads,
            image_size=patch * round(num_patches**0.5),
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
        )
    except (KeyError, IndexError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{path}: not a CLIP vision tower: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"key {error.args[0]} is missing"
    return " ".join(str(error).split()) or type(error).__name__


def _read_config(kind: type[PretrainedConfig], folder: Path) -> Any:
    path = folder / "config.json"
    values = read_model_config(path)
    try:
        return kind(**values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{path}: not a readable config; download it again") from error


def _empty(path: Path, kind: Callable[[Any], PreTrainedModel], config: PretrainedConfig) -> Any:
    """Build a model on the meta device."""
    try:
        with torch.device("meta"):
            return kind(config)
    except (RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: the config makes no model ({_reason(error)})") from error


def _build_encoder(path: Path) -> tuple[UMT5EncoderModel, dict[str, Any]]:
    """Build an empty UMT5 encoder for a folder of transformers or an original file.

    Returns: the encoder, and what `check_files` and `load_files` take to fill it.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    if path.is_dir():
        config = _read_config(UMT5Config, path)
        source = {"paths": find_shards(path), "origin": Origin}
    else:
        config = _umt5_config(path)
        source = {"paths": (path,), "origin": lambda name: Origin(umt5_key(name))}
    return _empty(path, UMT5EncoderModel, config), source


def _build_vision(
    path: Path, *, num_heads: int
) -> tuple[CLIPVisionModelWithProjection, dict[str, Any]]:
    """Build an empty CLIP tower; see `_build_encoder`."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if path.is_dir():
        config = _read_config(CLIPVisionConfig, path)
        source = {"paths": find_shards(path), "origin": Origin, "ignored": _is_position_table}
    else:
        config = _clip_config(path, num_heads=num_heads)
        source = {"paths": (path,), "origin": clip_origin, "ignored": _is_not_visual}
    return _empty(path, CLIPVisionModelWithProjection, config), source


def _check_width(path: Path, found: int, wanted: int | None) -> None:
    if found != wanted:
        raise UserError(f"{path}: width is {found}, the transformer takes {wanted}")


def check_encoder(path: Path, *, tokenizer: Path, width: int) -> None:
    """Check the text encoder by the headers of its files, and the tokenizer.

    Args:
        width: what the transformer takes.
    """
    model, source = _build_encoder(path)
    _check_width(path, model.config.d_model, width)
    check_files(model, **source)
    load_tokenizer(tokenizer, vocab_size=model.config.vocab_size, needs_padding=True)


def check_vision(path: Path, *, width: int | None, num_heads: int = CLIP_HEADS) -> None:
    """Check the image encoder's files by their headers; see `check_encoder`."""
    model, source = _build_vision(path, num_heads=num_heads)
    _check_width(path, model.config.hidden_size, width)
    check_files(model, **source)


def released_encoder() -> UMT5EncoderModel:
    """Build an empty encoder of the released size (UMT5-XXL)."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
    )
    return _empty(Path("UMT5-XXL"), UMT5EncoderModel, config)


def empty_encoder(path: Path) -> UMT5EncoderModel:
    """Build an empty encoder of the size of a folder of transformers or an original file."""
    return _build_encoder(path)[0]


def vision_weights(path: Path) -> int:
    """Count the parameters of an image encoder."""
    model, _ = _build_vision(path, num_heads=CLIP_HEADS)
    return sum(parameter.numel() for parameter in model.parameters())


def fingerprint(path: Path, *, tokenizer: Path) -> str:
    """Return a hash of the text encoder and its tokenizer; little of the weights is read."""
    model, source = _build_encoder(path)
    weights = match(model, read(source["paths"]), origin=source["origin"])
    sizes = {"tokenizer": hash_files(tokenizer_files(tokenizer))}
    return profile.fingerprint(sizes, ((names[0], tensor) for names, tensor in weights))


def load_encoder(
    path: Path,
    *,
    tokenizer: Path,
    text_len: int,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> TextEncoder:
    """Load UMT5 from a folder of transformers or an original file.

    Args:
        text_len: tokens the transformer takes.
        dtype: type of all weights; None keeps each as stored.
    """
    model, source = _build_encoder(path)
    words = load_tokenizer(tokenizer, vocab_size=model.config.vocab_size, needs_padding=True)
    load_files(model, **source, dtype=dtype, device=device)
    return TextEncoder(model, words, text_len=text_len)


def load_vision(
    path: Path,
    *,
    num_heads: int = CLIP_HEADS,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> VisionEncoder:
    """Load CLIP's vision tower from a folder of transformers or an original file.

    Args:
        num_heads: attention heads, read only where the file does not say (original layout).
        dtype: type of all weights; None keeps each as stored.
    """
    model, source = _build_vision(path, num_heads=num_heads)
    load_files(model, **source, dtype=dtype, device=device)
    table: Any = model.vision_model.embeddings
    # a table, not a weight: no file holds it, so it is still on the meta device
    table.position_ids = torch.arange(table.num_positions, device=device).expand(1, -1)
    return VisionEncoder(model)
