"""Random MAGI-1 checkpoints that make a clip of two chunks in a second."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from magi1.config import ModelConfig
from magi1.dit import DiT, set_precision
from magi1.vae import ViTVAE, parse_config

HEIGHT, WIDTH = 32, 48
MODEL_4_5B = ModelConfig(
    model_name="videodit_ardf",
    num_layers=34,
    hidden_size=3072,
    ffn_hidden_size=12288,
    num_attention_heads=24,
    num_query_groups=8,
    kv_channels=128,
    layernorm_epsilon=1e-6,
    apply_layernorm_1p=True,
    x_rescale_factor=1.0,
    half_channel_vae=False,
    params_dtype="torch.bfloat16",
    patch_size=2,
    t_patch_size=1,
    in_channels=16,
    out_channels=16,
    cond_hidden_ratio=0.25,
    caption_channels=4096,
    caption_max_length=800,
    xattn_cond_hidden_ratio=1.0,
    cond_gating_ratio=1.0,
    gated_linear_unit=False,
)
"""The released 4.5B model."""

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "cat",
    "moving",
    "left",
    "right",
    "on",
    "black",
]

VAE_CONFIG: dict[str, Any] = {
    "_class_name": "ViTVAE",
    "model_type": "vit",
    "ddconfig": {
        "video_size": 32,
        "video_length": 12,
        "z_chans": 4,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "mlp_ratio": 2,
        "qkv_bias": True,
        "ln_in_attn": True,
        "conv_last_layer": True,
        "use_final_proj": True,
    },
}


def config_document(
    *, is_base: bool = False, is_fp8: bool = False, num_layers: int | None = None
) -> dict[str, Any]:
    """Return a JSON config for a model that makes a clip of two chunks in a second."""
    model = replace(
        MODEL_4_5B,
        num_layers=num_layers or (3 if is_fp8 else 2),
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        in_channels=4,
        out_channels=4,
        caption_channels=12,
        caption_max_length=60,
        params_dtype="torch.bfloat16" if is_fp8 else "torch.float32",
    )
    runtime = {
        "cfg_number": 3 if is_base else 1,
        "cfg_t_range": [0.0, 0.3],
        "prev_chunk_scales": [1.5, 1.0],
        "text_scales": [7.5, 0.0],
        "noise2clean_kvrange": [],
        "clean_chunk_kvrange": 1,
        "clean_t": 0.9999,
        "seed": 3,
        "num_frames": 24,
        "video_size_h": HEIGHT,
        "video_size_w": WIDTH,
        "num_steps": 4,
        "window_size": 2,
        "fps": 24,
        "chunk_width": 3,
        "load": "ckpt/dit",
        "t5_pretrained": "ckpt/t5",
        "t5_device": "cpu",
        "vae_pretrained": "ckpt/vae",
        "scale_factor": 0.5,
        "temporal_downsample_factor": 4,
    }
    engine = {
        "distributed_backend": "nccl",
        "distributed_timeout_minutes": 15,
        "pp_size": 1,
        "cp_size": 1,
        "cp_strategy": "none",
        "ulysses_overlap_degree": 1,
        "fp8_quant": is_fp8,
        "distill_nearly_clean_chunk_threshold": 0.3,
        "shortcut_mode": "8,16,16",
        "distill": not is_base,
        "kv_offload": False,
        "enable_cuda_graph": False,
    }
    return {"model_config": asdict(model), "runtime_config": runtime, "engine_config": engine}


def write_checkpoint(folder: Path, **kind: Any) -> Path:
    """Write random weights in the layout of the release, and special tokens."""
    document = config_document(**kind)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(document, indent=4))
    engine = document["engine_config"]
    suffix = ".fp8" * engine["fp8_quant"] + ".distill" * engine["distill"]
    torch.manual_seed(0)
    dit = DiT(ModelConfig(**document["model_config"]), is_fp8=engine["fp8_quant"])
    set_precision(dit, getattr(torch, document["model_config"]["params_dtype"][6:]))
    _save(dit.state_dict(), folder / f"ckpt/dit/inference_weight{suffix}/model.safetensors")
    vae = ViTVAE(parse_config(VAE_CONFIG["ddconfig"], source="test"))
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    _save(vae.state_dict(), folder / "ckpt/vae/diffusion_pytorch_model.safetensors")
    (folder / "ckpt/vae/config.json").write_text(json.dumps(VAE_CONFIG))
    _write_text_encoder(folder / "ckpt/t5/t5-v1_1-xxl")
    draw = np.random.default_rng(0)
    shapes = {"caption_token": (1, 12), "logo_token": (1, 12), "other_tokens": (100, 12)}
    np.savez(
        folder / "special_tokens.npz",
        **{name: draw.normal(size=shape) for name, shape in shapes.items()},
    )
    (folder / "presets").mkdir()
    (folder / "presets/base.yaml").write_text("special_tokens: special_tokens.npz\n")
    return folder


def _save(state: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in state.items()}, path)


def _write_text_encoder(folder: Path) -> None:
    vocabulary = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 1}
    T5EncoderModel(T5Config(**sizes, num_heads=3, feed_forward_proj="gated-gelu")).save_pretrained(
        folder
    )
