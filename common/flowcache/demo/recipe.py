"""What the recipes of all models share: files of a training, records of its stages, its export."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from flowcache.demo.latents import encode_bank
from flowcache.demo.text import build_tokenizer
from flowcache.demo.trainer import TrainPlan
from flowcache.demo.vae import ClipMixture, Codec, measured_psnr, train_autoencoder

VAEType = TypeVar("VAEType", bound=nn.Module)

logger = logging.getLogger(__name__)
RECORD = "training.json"
NOT_TRAINED = ("presets", "profiles", RECORD)
"""At the top of a checkpoint folder, what the training does not make."""
START_RATES = {"vae": 0.25, "transformer": 0.5}
"""Factors on the learning rates of a training that begins with trained weights, which the rates for
untrained ones would destroy."""
# Steps the final loss is averaged over.
_FINAL_STEPS = 100


@dataclass(frozen=True)
class Training:
    """One training: where it keeps its files, and how long its stages are.

    Attributes:
        out: folder of the training's own files.
        threads: CPU threads.
        num_clips: clips that the transformer learns from.
        steps: optimizer steps by stage.
        start: checkpoint folder whose weights the training begins with; None: it begins anew.
    """

    out: Path
    threads: int
    num_clips: int
    steps: Mapping[str, int]
    start: Path | None = None

    def rate(self, part: str) -> float:
        """Return the factor on the learning rates of the `vae` or the `transformer`."""
        return 1.0 if self.start is None else START_RATES[part]

    def checkpoint(self, stage: str) -> Path:
        """Return the file that a stage goes on from."""
        return self.out / f"{stage}.pt"

    def record(self, stage: str) -> dict[str, float]:
        """Say how long a stage was and what it reached."""
        saved = torch.load(self.checkpoint(stage), weights_only=True)
        last = saved["losses"][-_FINAL_STEPS:]
        return {
            "steps": saved["step"],
            "seconds": round(saved["seconds"]),
            "final_loss": round(sum(last) / len(last), 4),
        }

    def parts_record(
        self, *, vae: nn.Module, transformer: nn.Module, text_encoder: nn.Module, psnr: float
    ) -> dict[str, Any]:
        """Say how large the parts of every demo are, how they were trained, what the VAE reaches.

        Args:
            psnr: of the VAE on unseen clips, in dB.
        """
        parts = {"vae": vae, "transformer": transformer, "text_encoder": text_encoder}
        return {
            "num_parameters": {
                name: sum(param.numel() for param in part.parameters())
                for name, part in parts.items()
            },
            "vae": self.record("vae"),
            "decoder": self.record("decoder"),
            "vae_psnr_db_on_unseen_clips": psnr,
            "transformer": self.record("dit"),
        }


@dataclass(frozen=True)
class VAERecipe(Generic[VAEType]):
    """How a model's VAE is trained: as a whole, then its decoder alone.

    The decoder's training leaves the latents as they are, so it can go on while the transformer
    learns from them. Every stage is loaded if it is done, with averaged weights.

    Attributes:
        new: makes the VAE that training begins with, from a checkpoint folder or untrained.
        codec: its two directions, with latents that are not normalised.
        decoder: the part that is trained on.
        optimizers: of the whole VAE.
        decoder_optimizers: of a VAE in which only the decoder's parameters are not frozen.
        clips: what the VAE learns from.
        decoder_clips: what its decoder learns from.
        clip_frames: pixel frames of a clip that the transformer learns from.
    """

    new: Callable[[Path | None], VAEType]
    codec: Callable[[VAEType], Codec]
    decoder: Callable[[VAEType], nn.Module]
    optimizers: Callable[[VAEType], list[Optimizer]]
    decoder_optimizers: Callable[[VAEType], list[Optimizer]]
    clips: ClipMixture
    decoder_clips: ClipMixture
    clip_frames: int

    def train(self, training: Training) -> VAEType:
        """Train the VAE."""
        vae = self.new(training.start)
        train_autoencoder(
            vae,
            self.codec(vae),
            self.optimizers(vae),
            plan=TrainPlan(num_steps=training.steps["vae"], rate=training.rate("vae")),
            checkpoint=training.checkpoint("vae"),
            clips=self.clips,
        )
        return vae

    def train_decoder(self, training: Training) -> VAEType:
        """Train only the decoder of the trained VAE on; returns the whole VAE."""
        vae = self.train(training)
        decoder = self.decoder(vae).requires_grad_(True)
        train_autoencoder(
            decoder,
            self.codec(vae),
            self.decoder_optimizers(vae),
            plan=TrainPlan(
                num_steps=training.steps["decoder"],
                decay_share=0.6,
                rate=training.rate("vae"),
                seed=1,
            ),
            checkpoint=training.checkpoint("decoder"),
            clips=self.decoder_clips,
        )
        return vae.eval()

    def encode_latents(self, training: Training) -> None:
        """Encode the clips that the transformer learns from."""
        encode_bank(
            self.codec(self.train(training)).encode,
            num_clips=training.num_clips,
            num_frames=self.clip_frames,
            folder=training.out,
        )

    def psnr(self, vae: VAEType) -> float:
        """Return the mean PSNR in dB of clips of unseen attributes, encoded and decoded."""
        return measured_psnr(self.codec(vae), num_frames=self.clip_frames)


@dataclass(frozen=True)
class Recipe:
    """How one model's demo is trained.

    Attributes:
        shipped: folder of the checkpoint in the repository.
        default_steps: optimizer steps by stage.
        stages: what is done, in order; each stage goes on from its own files.
        export: writes the checkpoint folder; returns what the record says of its parts.
    """

    shipped: Path
    default_steps: Mapping[str, int]
    stages: Mapping[str, Callable[[Training], object]]
    export: Callable[[Training, Path], dict[str, Any]]


def write_tokenizer(training: Training) -> None:
    """Write the tokenizer, to look at; every stage builds its own."""
    build_tokenizer().save_pretrained(training.out / "tokenizer")


@contextmanager
def new_files(folder: Path) -> Generator[Path, None, None]:
    """Yield an empty folder whose files are moved into `folder` at the end, each in one step."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in [path for path in temporary.rglob("*") if path.is_file()]:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(temporary)


def write_record(
    training: Training, folder: Path, *, model: str, parts: dict[str, Any], note: str
) -> None:
    """Write how a checkpoint folder was made, and the hashes of its files."""
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in NOT_TRAINED
    }
    steps = "".join(f" --{name}-steps {value}" for name, value in training.steps.items())
    start = "" if training.start is None else f" --start {training.start.name}"
    record = {
        "command": f"python scripts/train_demo.py --architecture {model} --out {training.out.name}"
        f"{start}{steps} --num-clips {training.num_clips} --threads {training.threads}",
        **parts,
        "note": note,
        "sha256": files,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    logger.info("wrote %s", folder)
