"""The MAGI-1 demo as a checkpoint folder in the layout of the release."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import T5EncoderModel

from flowcache.demo.clips import FPS
from flowcache.demo.text import build_tokenizer
from magi1.dit import DiT
from magi1.vae import ViTVAE
from training.magi1_losses import CLEAN_T, GUIDANCE
from training.magi1_models import CHUNK_WIDTH, DIT, LATENT_CHANNELS, VAE, DemoModels
from training.work import move_over, new_temporary

SCALE_FACTOR = 0.18215


def write_checkpoint(
    vae: ViTVAE,
    models: DemoModels,
    student: DiT,
    *,
    statistics: dict[str, list[float]],
    folder: Path,
) -> None:
    """Write all parts in float16 in the layout of the release; a reader never sees half a file."""
    temporary = new_temporary(folder)
    fold_statistics(vae, **statistics)
    _save(vae, temporary / "ckpt/vae/diffusion_pytorch_model.safetensors")
    vae_config = {"_class_name": "ViTVAE", "model_type": "vit", "ddconfig": asdict(VAE)}
    _write_json(temporary / "ckpt/vae/config.json", vae_config)
    _save(models.dit, temporary / "ckpt/magi/base/inference_weight/model.safetensors")
    _save(student, temporary / "ckpt/magi/distill/inference_weight.distill/model.safetensors")
    text: T5EncoderModel = models.text.half()
    text.save_pretrained(temporary / "ckpt/t5/t5-v1_1-xxl")
    build_tokenizer().save_pretrained(temporary / "ckpt/t5/t5-v1_1-xxl")
    tokens = models.tokens.detach().double().numpy()
    np.savez_compressed(
        temporary / "special_tokens.npz",
        caption_token=tokens[:1],
        logo_token=tokens[1:2],
        other_tokens=tokens[2:],
    )
    for name, config in released_configs().items():
        _write_json(temporary / f"{name}_config.json", config)
    move_over(temporary, folder)


def released_configs() -> dict[str, dict[str, Any]]:
    """Return the JSON configs of both transformers, fields as in the release's."""
    runtime = {
        "cfg_t_range": GUIDANCE.t_range,
        "prev_chunk_scales": GUIDANCE.prev_scales,
        "text_scales": GUIDANCE.text_scales,
        "noise2clean_kvrange": [5, 4, 3, 2],
        "clean_chunk_kvrange": 1,
        "clean_t": CLEAN_T,
        "seed": 1234,
        "num_frames": 144,
        "video_size_h": 64,
        "video_size_w": 64,
        "num_steps": 64,
        "window_size": 4,
        "fps": FPS,
        "chunk_width": CHUNK_WIDTH,
        "t5_pretrained": "ckpt/t5",
        "t5_device": "cpu",
        "vae_pretrained": "ckpt/vae",
        "scale_factor": SCALE_FACTOR,
        "temporal_downsample_factor": VAE.patch_length,
    }
    engine = {
        "distributed_backend": "nccl",
        "distributed_timeout_minutes": 15,
        "pp_size": 1,
        "cp_size": 1,
        "cp_strategy": "cp_ulysses",
        "ulysses_overlap_degree": 1,
        "fp8_quant": False,
        "distill_nearly_clean_chunk_threshold": 0.3,
        "shortcut_mode": "8,16,16",
        "kv_offload": False,
        "enable_cuda_graph": False,
    }
    return {
        name: {
            "model_config": asdict(DIT),
            "runtime_config": {"cfg_number": passes, **runtime, "load": f"ckpt/magi/{name}"},
            "engine_config": {**engine, "distill": name == "distill"},
        }
        for name, passes in (("base", 3), ("distill", 1))
    }


def fold_statistics(vae: ViTVAE, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Change a VAE so that its scaled latents have mean 0 and deviation 1, in place.

    The release scales all channels by one factor, so what differs between them goes into the last
    layer of the encoder and the first of the decoder.
    """
    scale, shift = torch.tensor(std) * SCALE_FACTOR, torch.tensor(mean)
    with torch.no_grad():
        last, first = vae.encoder.last_layer, vae.decoder.proj_in
        last.bias[:LATENT_CHANNELS] -= shift
        last.bias[:LATENT_CHANNELS] /= scale
        last.weight[:LATENT_CHANNELS] /= scale[:, None]
        first.bias += first.weight @ shift
        first.weight *= scale


def _save(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
