"""Tiny random replicas of every release, file by file as they lie on the hub.

Names, keys, ranks of shapes, types, shards and configs are those of the releases; widths and depths
are not. Nothing here is made with the code that reads it.

Sources: the file lists and configs of Skywork/SkyReels-V2-* and sand-ai/MAGI-1 on the hub and in
their repositories; the Wan 2.1 VAE, UMT5-XXL and CLIP files that SkyReels-V2 ships.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import zstandard
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

Shapes = dict[str, tuple[int, ...]]

TEXT_WIDTH, NUM_LAYERS = 32, 2
SENTENCES = (
    "a red circle moving right on a black background",
    "a blue triangle moving up on a white background",
    "two swans glide over a still lake at sunrise, water ripples",
    "a motorcycle races across a desert at dusk, dust rising behind it",
)
EXTRA_IDS = 100


def random_state(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return small random weights; scales of norms are ones."""
    draw = torch.Generator().manual_seed(0)
    return {
        key: torch.ones(shape, dtype=dtype)
        if key.endswith("gamma")
        else (torch.randn(shape, generator=draw) * 0.05).to(dtype)
        for key, shape in shapes.items()
    }


def save_shards(
    state: Mapping[str, Tensor], folder: Path, *, stem: str, num: int, suffix: str = ".safetensors"
) -> None:
    """Write one file, or numbered shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    save: Callable[..., Any] = save_file if suffix == ".safetensors" else torch.save
    if num == 1:
        save(dict(state), folder / f"{stem}{suffix}")
        return
    names = [f"{stem}-{place + 1:05d}-of-{num:05d}{suffix}" for place in range(num)]
    weight_map = {key: names[place % num] for place, key in enumerate(state)}
    for name in names:
        save({k: v for k, v in state.items() if weight_map[k] == name}, folder / name)
    total = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def strew(folder: Path) -> None:
    """Put what hubs and systems leave next to the files."""
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
            (path.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


# Tokenizers ---------------------------------------------------------------------------------------


def write_spiece(folder: Path) -> Path:
    """Train a SentencePiece model with the settings of T5's: unigram, no BOS, pad 0, end 1."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spiece"),
        vocab_size=80,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    corpus.unlink()
    (folder / "spiece.vocab").unlink()
    return folder / "spiece.model"


def write_tokenizer(folder: Path, spiece: Path, *, kind: str, has_json: bool) -> None:
    """Write a tokenizer folder of T5's kind; `tokenizer.json` only where the release has it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(spiece, folder / "spiece.model")
    extra = [f"<extra_id_{number}>" for number in range(EXTRA_IDS)]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special | {"additional_special_tokens": extra})
    config = special | {
        "additional_special_tokens": extra,
        "extra_ids": EXTRA_IDS,
        "model_max_length": 512,
        "name_or_path": f"google/{folder.name}",
        "sp_model_kwargs": {},
        "special_tokens_map_file": "special_tokens_map.json",
        "tokenizer_class": kind,
    }
    write_json(folder / "tokenizer_config.json", config)
    if has_json:
        made = folder.parent / "made"
        AutoTokenizer.from_pretrained(folder).save_pretrained(made)
        shutil.move(made / "tokenizer.json", folder / "tokenizer.json")
        shutil.rmtree(made)


# SkyReels-V2 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SkyReels:
    """One of the eight released models.

    Attributes:
        name: the end of the repository's name.
        stem: of the files of the transformer in the original layout.
        num_files: how many these are.
    """

    name: str
    stem: str
    num_files: int

    @property
    def is_i2v(self) -> bool:
        return self.name.startswith("I2V")

    @property
    def has_fps(self) -> bool:
        return self.name == "DF-1.3B-540P"


SKYREELS = (
    SkyReels("DF-1.3B-540P", "model", 1),
    SkyReels("DF-14B-540P", "model", 12),
    SkyReels("DF-14B-720P", "diffusion_pytorch_model", 6),
    SkyReels("T2V-14B-540P", "model", 12),
    SkyReels("T2V-14B-720P", "diffusion_pytorch_model", 6),
    SkyReels("I2V-1.3B-540P", "model", 1),
    SkyReels("I2V-14B-540P", "model", 14),
    SkyReels("I2V-14B-720P", "diffusion_pytorch_model", 7),
)

WIDTH, HEADS, FFN, FREQUENCIES = 48, 4, 64, 32
CLIP_WIDTH = 1280
"""Not shrunk: the original layout says it nowhere."""


def leaves(prefix: str, *shape: int) -> Shapes:
    """Return weight and bias of a layer or norm."""
    return {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}


def skyreels_shapes(model: SkyReels, *, num_layers: int = NUM_LAYERS) -> Shapes:
    """Return the transformer's tensors in the original layout."""
    d = WIDTH
    shapes = leaves("patch_embedding", d, 36 if model.is_i2v else 16, 1, 2, 2)
    shapes |= leaves("time_embedding.0", d, FREQUENCIES) | leaves("time_embedding.2", d, d)
    shapes |= leaves("time_projection.1", 6 * d, d)
    shapes |= leaves("text_embedding.0", d, TEXT_WIDTH) | leaves("text_embedding.2", d, d)
    if model.has_fps:
        shapes |= {"fps_embedding.weight": (2, d)}
        shapes |= leaves("fps_projection.0", d, d) | leaves("fps_projection.2", 6 * d, d)
    for i in range(num_layers):
        block = f"blocks.{i}"
        shapes |= {f"{block}.modulation": (1, 6, d)} | leaves(f"{block}.norm3", d)
        for part in ("self_attn", "cross_attn"):
            for name in "qkvo":
                shapes |= leaves(f"{block}.{part}.{name}", d, d)
            shapes |= {f"{block}.{part}.norm_{name}.weight": (d,) for name in "qk"}
        shapes |= leaves(f"{block}.ffn.0", FFN, d) | leaves(f"{block}.ffn.2", d, FFN)
        if model.is_i2v:
            for name in ("k_img", "v_img"):
                shapes |= leaves(f"{block}.cross_attn.{name}", d, d)
            shapes |= {f"{block}.cross_attn.norm_k_img.weight": (d,)}
    shapes |= {"head.modulation": (1, 2, d)} | leaves("head.head", 64, d)
    if model.is_i2v:
        shapes |= leaves("img_emb.proj.0", CLIP_WIDTH)
        shapes |= leaves("img_emb.proj.1", CLIP_WIDTH, CLIP_WIDTH)
        shapes |= leaves("img_emb.proj.3", d, CLIP_WIDTH) | leaves("img_emb.proj.4", d)
    return shapes


DIFFUSERS_NAMES = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("fps_projection.0", "fps_projection.net.0.proj"),
    ("fps_projection.2", "fps_projection.net.2"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    (".modulation", ".scale_shift_table"),
    (".norm3.", ".norm2."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
    (".norm_k_img.", ".norm_added_k."),
    *((f"_attn.{n}_img.", f"_attn.add_{n}_proj.") for n in "kv"),
    *((f"_attn.{n}.", f"_attn.to_{n}.") for n in "qkv"),
    ("_attn.o.", "_attn.to_out.0."),
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
)


def diffusers_name(key: str) -> str:
    for original, renamed in DIFFUSERS_NAMES:
        key = key.replace(original, renamed)
    return key


def wan_vae_shapes(base: int = 8) -> Shapes:
    """Return the 194 tensors of the Wan 2.1 VAE's file, of another width."""

    def residual(prefix: str, before: int, after: int) -> Shapes:
        shapes: Shapes = {f"{prefix}.residual.0.gamma": (before, 1, 1, 1)}
        shapes |= leaves(f"{prefix}.residual.2", after, before, 3, 3, 3)
        shapes |= {f"{prefix}.residual.3.gamma": (after, 1, 1, 1)}
        shapes |= leaves(f"{prefix}.residual.6", after, after, 3, 3, 3)
        return shapes | (
            leaves(f"{prefix}.shortcut", after, before, 1, 1, 1) if before != after else {}
        )

    def middle(prefix: str, width: int) -> Shapes:
        attention = leaves(f"{prefix}.1.to_qkv", 3 * width, width, 1, 1)
        attention |= {f"{prefix}.1.norm.gamma": (width, 1, 1)}
        attention |= leaves(f"{prefix}.1.proj", width, width, 1, 1)
        ends = residual(f"{prefix}.0", width, width) | residual(f"{prefix}.2", width, width)
        return ends | attention

    widths = [base, 2 * base, 4 * base, 4 * base]
    shapes, index, width = leaves("encoder.conv1", base, 3, 3, 3, 3), 0, base
    for level, after in enumerate(widths):
        for _ in range(2):
            shapes |= residual(f"encoder.downsamples.{index}", width, after)
            index, width = index + 1, after
        if level < 3:
            shapes |= leaves(f"encoder.downsamples.{index}.resample.1", width, width, 3, 3)
            if level > 0:
                name = f"encoder.downsamples.{index}.time_conv"
                shapes |= leaves(name, width, width, 3, 1, 1)
            index += 1
    shapes |= middle("encoder.middle", width)
    shapes |= {"encoder.head.0.gamma": (width, 1, 1, 1)}
    shapes |= leaves("encoder.head.2", 32, width, 3, 3, 3)
    shapes |= leaves("conv1", 32, 32, 1, 1, 1) | leaves("conv2", 16, 16, 1, 1, 1)
    shapes |= leaves("decoder.conv1", width, 16, 3, 3, 3) | middle("decoder.middle", width)
    index = 0
    for level, after in enumerate(reversed(widths)):
        for _ in range(3):
            shapes |= residual(f"decoder.upsamples.{index}", width, after)
            index, width = index + 1, after
        if level < 3:
            shapes |= leaves(f"decoder.upsamples.{index}.resample.1", width // 2, width, 3, 3)
            if level < 2:
                name = f"decoder.upsamples.{index}.time_conv"
                shapes |= leaves(name, 2 * width, width, 3, 1, 1)
            index, width = index + 1, width // 2
    shapes |= {"decoder.head.0.gamma": (base, 1, 1, 1)}
    return shapes | leaves("decoder.head.2", 3, base, 3, 3, 3)


def umt5_shapes(vocab_size: int) -> Shapes:
    """Return the tensors of the original UMT5 encoder's file."""
    width, heads, ffn = TEXT_WIDTH, 4, 40
    shapes: Shapes = {"token_embedding.weight": (vocab_size, width), "norm.weight": (width,)}
    for i in range(NUM_LAYERS):
        block = f"blocks.{i}"
        shapes |= {f"{block}.norm{n}.weight": (width,) for n in (1, 2)}
        shapes |= {f"{block}.attn.{name}.weight": (width, width) for name in "qkvo"}
        shapes[f"{block}.pos_embedding.embedding.weight"] = (32, heads)
        shapes |= {f"{block}.ffn.{name}.weight": (ffn, width) for name in ("gate.0", "fc1")}
        shapes[f"{block}.ffn.fc2.weight"] = (width, ffn)
    return shapes


def clip_shapes() -> Shapes:
    """Return the tensors of the original CLIP file, with some of its text side."""
    d, ffn = CLIP_WIDTH, 64
    shapes: Shapes = {
        "visual.patch_embedding.weight": (d, 3, 14, 14),
        "visual.cls_embedding": (1, 1, d),
        "visual.pos_embedding": (1, 257, d),
        "visual.head": (d, 1024),
        "log_scale": (),
        "textual.token_embedding.weight": (20, 32),
        "textual.blocks.0.attn.q.weight": (32, 32),
        "textual.head.0.weight": (32, 32),
    }
    shapes |= leaves("visual.pre_norm", d) | leaves("visual.post_norm", d)
    for i in range(NUM_LAYERS):
        block = f"visual.transformer.{i}"
        shapes |= leaves(f"{block}.norm1", d) | leaves(f"{block}.norm2", d)
        shapes |= leaves(f"{block}.attn.to_qkv", 3 * d, d) | leaves(f"{block}.attn.proj", d, d)
        shapes |= leaves(f"{block}.mlp.0", ffn, d) | leaves(f"{block}.mlp.2", d, ffn)
    return shapes


def write_skyreels(folder: Path, model: SkyReels, spiece: Path, *, layout: str) -> Path:
    """Write a replica of one model in one layout; 540P is stored in float32, 720P in bfloat16."""
    dtype = torch.bfloat16 if model.name.endswith("720P") else torch.float32
    state = random_state(skyreels_shapes(model), dtype)
    if layout == "original":
        _write_original(folder, model, spiece, state)
    else:
        _write_diffusers(folder, model, spiece, state)
    strew(folder)
    return folder


def _write_original(
    folder: Path, model: SkyReels, spiece: Path, state: Mapping[str, Tensor]
) -> None:
    save_shards(state, folder, stem=model.stem, num=model.num_files)
    config = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": WIDTH,
        "eps": 1e-6,
        "ffn_dim": FFN,
        "freq_dim": FREQUENCIES,
        "in_dim": 36 if model.is_i2v else 16,
        "inject_sample_info": model.has_fps,
        "model_type": "i2v" if model.is_i2v else "t2v",
        "num_heads": HEADS,
        "num_layers": NUM_LAYERS,
        "out_dim": 16,
        "text_len": 512,
        "text_dim": TEXT_WIDTH,  # left out there, where it is always 4096
    }
    write_json(folder / "config.json", config)
    torch.save(random_state(wan_vae_shapes()), folder / "Wan2.1_VAE.pth")
    write_tokenizer(folder / "google/umt5-xxl", spiece, kind="T5Tokenizer", has_json=True)
    umt5 = random_state(umt5_shapes(320), torch.bfloat16)
    torch.save(umt5, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    if model.is_i2v:
        name = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        torch.save(random_state(clip_shapes(), torch.float16), folder / name)
        write_tokenizer(folder / "xlm-roberta-large", spiece, kind="T5Tokenizer", has_json=True)


def _write_diffusers(
    folder: Path, model: SkyReels, spiece: Path, state: Mapping[str, Tensor]
) -> None:
    renamed = {diffusers_name(key): value for key, value in state.items()}
    num = 1 if "1.3B" in model.name else 3
    save_shards(renamed, folder / "transformer", stem="diffusion_pytorch_model", num=num)
    config = {
        "_class_name": "SkyReelsV2Transformer3DModel",
        "_diffusers_version": "0.35.0.dev0",
        "added_kv_proj_dim": WIDTH if model.is_i2v else None,
        "attention_head_dim": WIDTH // HEADS,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "ffn_dim": FFN,
        "freq_dim": FREQUENCIES,
        "image_dim": CLIP_WIDTH if model.is_i2v else None,
        "in_channels": 36 if model.is_i2v else 16,
        "inject_sample_info": model.has_fps,
        "num_attention_heads": HEADS,
        "num_frame_per_block": 1,
        "num_layers": NUM_LAYERS,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": TEXT_WIDTH,
    }
    write_json(folder / "transformer/config.json", config)
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8).save_pretrained(folder / "vae")
    text = UMT5Config(
        vocab_size=320, d_model=TEXT_WIDTH, d_kv=8, d_ff=40, num_layers=NUM_LAYERS, num_heads=4
    )
    UMT5EncoderModel(text).bfloat16().save_pretrained(
        folder / "text_encoder", max_shard_size="20KB"
    )
    write_tokenizer(folder / "tokenizer", spiece, kind="T5TokenizerFast", has_json=True)
    pipeline = "ImageToVideoPipeline" if model.is_i2v else "Pipeline"
    write_json(folder / "model_index.json", {"_class_name": f"SkyReelsV2{pipeline}"})
    scheduler = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    if model.is_i2v:
        clip = CLIPVisionConfig(
            hidden_size=CLIP_WIDTH,
            intermediate_size=64,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=16,
            projection_dim=1024,
            image_size=224,
            patch_size=14,
        )
        CLIPVisionModelWithProjection(clip).save_pretrained(folder / "image_encoder")
        processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}
        write_json(folder / "image_processor/preprocessor_config.json", processor)


# MAGI-1 -------------------------------------------------------------------------------------------

MAGI_SIZES: dict[str, Any] = {
    "num_layers": 3,  # the first and the last are never 8-bit
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 8,
    "caption_channels": TEXT_WIDTH,
    "caption_max_length": 60,
}
MAGI_RUN: dict[str, Any] = {
    "num_frames": 24,
    "video_size_h": 32,
    "video_size_w": 48,
    "num_steps": 4,
}
VAE_WIDTH = 256
"""Pixels of a patch, 4 x 8 x 8, times one channel; four in the release."""


def magi_state(model: Mapping[str, Any], *, is_fp8: bool) -> dict[str, Tensor]:
    """Return the transformer's tensors, embedders in float32 and layers in bfloat16."""
    d, hd, groups = model["hidden_size"], model["kv_channels"], model["num_query_groups"]
    caption, condition = model["caption_channels"], d // 4
    channels, up = model["in_channels"], model["ffn_hidden_size"]
    shapes: Shapes = {"x_embedder.weight": (d, channels, 1, 2, 2)}
    shapes |= leaves("t_embedder.mlp.0", condition, 256)
    shapes |= leaves("t_embedder.mlp.2", condition, condition)
    shapes["y_embedder.null_caption_embedding"] = (model["caption_max_length"], caption)
    shapes |= leaves("y_embedder.y_proj_xattn.0", d, caption)
    shapes |= leaves("y_embedder.y_proj_adaln.0", condition, caption)
    shapes |= {"rope.bands": (hd // 8,), "final_linear.linear.weight": (4 * channels, d)}
    state = random_state(shapes)
    state |= random_state(leaves("videodit_blocks.final_layernorm", d), torch.bfloat16)
    for i in range(model["num_layers"]):
        layer = f"videodit_blocks.layers.{i}"
        shapes = leaves(f"{layer}.ada_modulate_layer.proj.0", 2 * d, condition)
        attention = f"{layer}.self_attention"
        shapes |= leaves(f"{attention}.linear_qkv.layer_norm", d)
        shapes[f"{attention}.linear_kv_xattn.weight"] = (2 * groups * hd, d)
        for name in ("q_layernorm", "k_layernorm", "q_layernorm_xattn", "k_layernorm_xattn"):
            shapes |= leaves(f"{attention}.{name}", hd)
        for name in ("self_attn_post_norm", "mlp.layer_norm", "mlp_post_norm"):
            shapes |= leaves(f"{layer}.{name}", d)
        state |= random_state(shapes, torch.bfloat16)
        linear: Shapes = {
            f"{attention}.linear_qkv.q": (d, d),
            f"{attention}.linear_qkv.qx": (d, d),
            f"{attention}.linear_qkv.k": (groups * hd, d),
            f"{attention}.linear_qkv.v": (groups * hd, d),
            f"{layer}.mlp.linear_fc1": (up * 2 if model["gated_linear_unit"] else up, d),
            f"{attention}.linear_proj": (d, 2 * d),
            f"{layer}.mlp.linear_fc2": (d, up),
        }
        stored = is_fp8 and 0 < i < model["num_layers"] - 1
        for name, shape in linear.items():
            state |= (_fp8_linear if stored else _bf16_linear)(name, shape)
    return state


def _bf16_linear(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return random_state({f"{name}.weight": shape}, torch.bfloat16)


def _fp8_linear(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return an 8-bit layer: with a scale per input channel, or smoothed."""
    weight = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    is_smooth = name.endswith(("linear_proj", "linear_fc2"))
    state = {
        f"{name}.weight": weight.to(torch.float8_e4m3fn),
        f"{name}.weight_scale": torch.tensor([0.05]),
        f"{name}.input_scale": torch.full((1 if is_smooth else shape[1],), 0.1),
    }
    return state | ({f"{name}.smooth_scale": torch.full((1, shape[1]), 0.1)} if is_smooth else {})


def magi_vae_shapes() -> Shapes:
    """Return the tensors of the VAE: no first norms, no final projection."""
    d, patch = VAE_WIDTH, (4, 8, 8)
    shapes = leaves("encoder.patch_embed.proj", d, 3, *patch) | leaves("decoder.proj_in", d, 16)
    for side in ("encoder", "decoder"):
        shapes |= {f"{side}.cls_token": (1, 1, d), f"{side}.pos_embed": (1, 4 * 4 * 4 + 1, d)}
        shapes |= leaves(f"{side}.norm", d)
        for i in range(NUM_LAYERS):
            block = f"{side}.blocks.{i}"
            shapes |= leaves(f"{block}.attn.qkv", 3 * d, d) | leaves(f"{block}.attn.proj", d, d)
            shapes |= leaves(f"{block}.norm2", d)
            shapes |= leaves(f"{block}.mlp.fc1", 2 * d, d) | leaves(f"{block}.mlp.fc2", d, 2 * d)
    return (
        shapes | leaves("encoder.last_layer", 32, d) | leaves("decoder.last_layer", 3, 1, 3, 3, 3)
    )


MAGI_VAE: dict[str, Any] = {
    "_class_name": "ViTVAE",
    "_diffusers_version": "0.29.2",
    "model_type": "vit",
    "ddconfig": {
        "video_size": 32,
        "video_length": 16,
        "patch_size": 8,
        "patch_length": 4,
        "in_chans": 3,
        "z_chans": 16,
        "double_z": True,
        "embed_dim": VAE_WIDTH,
        "depth": NUM_LAYERS,
        "num_heads": 4,
        "mlp_ratio": 2,
        "qkv_bias": True,
        "drop_rate": 0.0,
        "with_cls_token": True,
        "ln_in_attn": True,
        "conv_last_layer": True,
        "norm_code": False,
        "use_rope": False,
        "use_final_proj": False,
    },
}


def t5_shapes(vocab_size: int) -> Shapes:
    """Return the tensors of a T5 v1.1 encoder, tied twice as transformers once saved them."""
    width, inner, ffn = TEXT_WIDTH, 32, 40
    shapes: Shapes = {
        "shared.weight": (vocab_size, width),
        "encoder.embed_tokens.weight": (vocab_size, width),
        "encoder.final_layer_norm.weight": (width,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4),
    }
    for i in range(NUM_LAYERS):
        layer = f"encoder.block.{i}.layer"
        shapes |= {f"{layer}.{n}.layer_norm.weight": (width,) for n in (0, 1)}
        shapes |= {f"{layer}.0.SelfAttention.{n}.weight": (inner, width) for n in "qkv"}
        shapes[f"{layer}.0.SelfAttention.o.weight"] = (width, inner)
        shapes |= {f"{layer}.1.DenseReluDense.{n}.weight": (ffn, width) for n in ("wi_0", "wi_1")}
        shapes[f"{layer}.1.DenseReluDense.wo.weight"] = (width, ffn)
    return shapes


def write_t5(folder: Path, spiece: Path) -> None:
    """Write the T5 folder: pickled shards with an index, and SentencePiece alone."""
    write_tokenizer(folder, spiece, kind="T5Tokenizer", has_json=False)
    shapes = t5_shapes(320)
    state = random_state(shapes)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    save_shards(state, folder, stem="pytorch_model", num=2, suffix=".bin")
    write_t5_config(folder, vocab_size=320)


def write_t5_config(folder: Path, *, vocab_size: int) -> None:
    config = {
        "architectures": ["T5EncoderModel"],
        "d_ff": 40,
        "d_kv": 8,
        "d_model": TEXT_WIDTH,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": NUM_LAYERS,
        "num_heads": 4,
        "num_layers": NUM_LAYERS,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.21.1",
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    write_json(folder / "config.json", config)


MAGI = (
    *("4.5B_base", "4.5B_distill", "4.5B_distill_quant"),
    *("24B_base", "24B_distill", "24B_distill_quant"),
)


def write_magi(folder: Path, name: str, spiece: Path, *, config: Path) -> Path:
    """Write a replica of one model; 8-bit shards are packed. Returns its JSON config.

    Args:
        config: the released JSON config.
    """
    document = json.loads(config.read_text())
    document["model_config"] |= MAGI_SIZES
    document["runtime_config"] |= MAGI_RUN
    document["runtime_config"] |= {
        "load": f"./ckpt/magi/{name}",
        "t5_pretrained": "./ckpt/t5",
        "vae_pretrained": "./ckpt/vae",
    }
    engine = document["engine_config"]
    suffix = ".fp8" * engine["fp8_quant"] + ".distill" * engine["distill"]
    weights = folder / "ckpt/magi" / name / f"inference_weight{suffix}"
    state = magi_state(document["model_config"], is_fp8=engine["fp8_quant"])
    save_shards(state, weights, stem="model", num=2)
    if engine["fp8_quant"]:
        pack(weights)
    save_file(
        random_state(magi_vae_shapes()),
        mkdir(folder / "ckpt/vae") / "diffusion_pytorch_model.safetensors",
    )
    write_json(folder / "ckpt/vae/config.json", MAGI_VAE)
    write_t5(folder / "ckpt/t5/t5-v1_1-xxl", spiece)
    draw = np.random.default_rng(0)
    tokens = {"caption_token": 1, "logo_token": 1, "other_tokens": 100}
    assets = mkdir(folder / "example/assets")
    np.savez(
        assets / "special_tokens.npz",
        **{key: draw.normal(size=(num, TEXT_WIDTH)) for key, num in tokens.items()},
    )
    path = folder / f"{name}_config.json"
    write_json(path, document)
    strew(folder)
    return path


def mkdir(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pack(folder: Path) -> None:
    """Compress the shards of a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        packed = path.with_name(f"{path.name}.zst")
        packed.write_bytes(zstandard.compress(path.read_bytes()))
        path.unlink()
