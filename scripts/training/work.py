"""What the recipes of all models share: files of a training, its stages' records, its export."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowcache.demo.autoencoder import (
    BatchShape,
    Codec,
    autoencoder_loss,
    autoencoder_psnr,
    to_signed,
)
from flowcache.demo.clips import split_attributes
from flowcache.demo.latents import LatentBank, encode_shards, load_bank, measure_channels
from flowcache.demo.text import build_tokenizer
from flowcache.demo.trainer import Trainer, TrainPlan

logger = logging.getLogger("train_demo")
RECORD = "training.json"
CAPTION_DROP = 0.1
# Clips the latent statistics are measured on: the first shards of the bank.
STATISTICS_CLIPS = 200
VAE_TEST_CLIPS = 24
# Steps the final loss is averaged over.
_FINAL_STEPS = 100


@dataclass(frozen=True)
class Work:
    """One training: where it keeps its files, and how long its stages are.

    Attributes:
        out: folder of the training's own files.
        threads: CPU threads.
        num_clips: clips that the transformer learns from.
        steps: optimizer steps by stage.
    """

    out: Path
    threads: int
    num_clips: int
    steps: Mapping[str, int]

    def checkpoint(self, stage: str) -> Path:
        """Return the file that a stage goes on from."""
        return self.out / f"{stage}.pt"

    @property
    def bank(self) -> Path:
        """Folder of the encoded clips."""
        return self.out / "latents"


Stage = Callable[[Work], object]


@dataclass(frozen=True)
class Recipe:
    """How one model's demo is trained.

    Attributes:
        shipped: folder of the checkpoint in the repository.
        default_steps: optimizer steps by stage.
        stages: what is done, in order; each stage goes on from its own files.
        export: writes the checkpoint folder; returns what the record says of its parts.
        frozen: names at the top of the checkpoint folder that are not made by the training.
    """

    shipped: Path
    default_steps: Mapping[str, int]
    stages: Mapping[str, Stage]
    export: Callable[[Work, Path], dict[str, Any]]
    frozen: Sequence[str] = ("presets", RECORD)


def write_tokenizer(work: Work) -> None:
    """Write the tokenizer, to look at; every stage builds its own."""
    build_tokenizer().save_pretrained(work.out / "tokenizer")


def train_autoencoder(
    module: nn.Module,
    codec: Codec,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    plan: TrainPlan,
    checkpoint: Path,
    shapes: tuple[BatchShape, ...],
    scene_share: float,
) -> None:
    """Train a VAE, or a part of it, on clips of seen attributes; or load it if that is done."""
    seen, _ = split_attributes()
    trainer = Trainer(module, optimizers, plan=plan, checkpoint=checkpoint)
    trainer.run(autoencoder_loss(codec, seen, shapes=shapes, scene_share=scene_share))
    module.eval().requires_grad_(False)


def encode_bank(
    work: Work, encode: Callable[[Tensor], Tensor], *, num_frames: int, num_channels: int
) -> None:
    """Encode the bank of clips, and measure the latents of its first shards.

    Args:
        encode: pixels `[B, 3, T, H, W]` to latents `[B, C, F, h, w]`.
    """
    seen, _ = split_attributes()

    def encode_clips(clips: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return encode(torch.stack([to_signed(frames) for frames in clips]))

    statistics = work.out / "statistics.json"
    for num_clips in (STATISTICS_CLIPS, work.num_clips):
        encode_shards(
            encode_clips, seen, num_clips=num_clips, num_frames=num_frames, folder=work.bank
        )
        if not statistics.exists():
            raw = load_bank(work.bank, mean=[0.0] * num_channels, std=[1.0] * num_channels)
            mean, std = measure_channels(raw.latents[:STATISTICS_CLIPS])
            statistics.write_text(json.dumps({"mean": mean, "std": std}))


def read_statistics(work: Work) -> dict[str, list[float]]:
    """Return the mean and the standard deviation of every latent channel."""
    return json.loads((work.out / "statistics.json").read_text())


def read_bank(work: Work, *, mean: list[float], std: list[float]) -> LatentBank:
    """Return the encoded clips, normalised."""
    bank = load_bank(work.bank, mean=mean, std=std)
    logger.info("%d clips", len(bank.captions))
    return bank


def drop_some(rng: np.random.Generator, captions: list[str]) -> list[str]:
    """Leave out some captions, for guidance."""
    is_dropped = rng.random(len(captions)) < CAPTION_DROP
    return ["" if drop else text for text, drop in zip(captions, is_dropped, strict=True)]


def measured_psnr(codec: Codec, *, num_frames: int) -> float:
    """Return what a VAE reaches on unseen clips, in dB."""
    _, unseen = split_attributes()
    psnr = autoencoder_psnr(codec, unseen, num_clips=VAE_TEST_CLIPS, num_frames=num_frames)
    logger.info("VAE: %.2f dB PSNR on %d unseen clips", psnr, VAE_TEST_CLIPS)
    return round(psnr, 2)


def training_record(work: Work, stage: str) -> dict[str, float]:
    """Say how long a stage was and what it reached."""
    saved = torch.load(work.checkpoint(stage), weights_only=True)
    last = saved["losses"][-_FINAL_STEPS:]
    return {
        "steps": saved["step"],
        "seconds": round(saved["seconds"]),
        "final_loss": round(sum(last) / len(last), 4),
    }


def parts_record(
    work: Work, *, vae: nn.Module, transformer: nn.Module, text_encoder: nn.Module, psnr: float
) -> dict[str, Any]:
    """Say how large the parts of every demo are, how they were trained, and what the VAE reaches.

    Args:
        psnr: of the VAE on unseen clips, in dB.
    """
    parts = {"vae": vae, "transformer": transformer, "text_encoder": text_encoder}
    return {
        "num_parameters": {
            name: sum(param.numel() for param in part.parameters()) for name, part in parts.items()
        },
        "vae": training_record(work, "vae"),
        "decoder": training_record(work, "decoder"),
        "vae_psnr_db_on_unseen_clips": psnr,
        "transformer": training_record(work, "dit"),
    }


def move_over(temporary: Path, folder: Path) -> None:
    """Move every file of a finished temporary folder into place, one by one."""
    for path in [path for path in temporary.rglob("*") if path.is_file()]:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(temporary)


def new_temporary(folder: Path) -> Path:
    """Return an empty folder beside `folder`."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def write_record(
    work: Work, recipe: Recipe, folder: Path, *, model: str, parts: dict[str, Any], note: str
) -> None:
    """Write how a checkpoint folder was made, and the hashes of its files."""
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in recipe.frozen
    }
    steps = "".join(f" --{name}-steps {value}" for name, value in work.steps.items())
    record = {
        "command": f"python scripts/train_demo.py --model {model} --out {work.out.name}{steps}"
        f" --num-clips {work.num_clips} --threads {work.threads}",
        **parts,
        "note": note,
        "sha256": files,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    logger.info("wrote %s", folder)
