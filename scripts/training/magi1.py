"""The recipe of the MAGI-1 demo: ViT VAE, base and distilled transformer, T5, special tokens.

Stages: `tokenizer`, `vae`, `decoder` (the VAE's decoder alone, on; may run beside the next two),
`latents` (encodes the clips the transformer learns from), `dit` (base
transformer, text encoder and special tokens), `refine` (the same, on, with smaller batches and a
loss that weights noise levels), `distill` (teaches a copy of the transformer to give
in one pass what guidance makes of the base model's passes).
"""

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flowcache.demo.autoencoder import BatchShape
from flowcache.demo.optim import new_optimizers
from flowcache.demo.trainer import Trainer, TrainPlan
from magi1.dit import DiT
from magi1.vae import ViTVAE
from training.magi1_export import write_checkpoint
from training.magi1_losses import FORCING, GUIDANCE, REFINE_FORCING, BaseLoss, DistillLoss
from training.magi1_models import (
    LATENT_CHANNELS,
    TILE_FRAMES,
    DemoModels,
    ViTCodec,
    new_models,
    new_vae,
)
from training.work import (
    Recipe,
    Work,
    encode_bank,
    measured_psnr,
    parts_record,
    read_bank,
    read_statistics,
    train_autoencoder,
    training_record,
    write_tokenizer,
)

CLIP_FRAMES = 144
VAE_SHAPES = (
    *[BatchShape(8, TILE_FRAMES)] * 3,
    BatchShape(8, 8),
    *[BatchShape(8, TILE_FRAMES)] * 3,
    BatchShape(16, 4, num_still=8),
)
VAE_SCENES = 0.1
DECODER_SCENES = 0.05
LAYERS = ("videodit_blocks.layers.",)


def train_vae(work: Work) -> ViTVAE:
    """Train the VAE, or load it if that is done; returns it with averaged weights."""
    vae = new_vae()
    optimizers = new_optimizers(
        vae.named_parameters(),
        matrices_under=("encoder.blocks", "decoder.blocks"),
        matrix_rate=0.02,
        rate=2e-3,
    )
    train_autoencoder(
        vae,
        ViTCodec(vae),
        optimizers,
        plan=TrainPlan(num_steps=work.steps["vae"], checkpoint_steps=200),
        checkpoint=work.checkpoint("vae"),
        shapes=VAE_SHAPES,
        scene_share=VAE_SCENES,
    )
    return vae


def train_decoder(work: Work) -> ViTVAE:
    """Train only the VAE's decoder on, or load it if that is done; returns the whole VAE.

    The latents stay what they are, so this can go on while the transformer learns from them.
    """
    vae = train_vae(work)
    vae.decoder.requires_grad_(True)
    optimizers = new_optimizers(
        vae.decoder.named_parameters(), matrices_under=("blocks",), matrix_rate=0.015, rate=1.5e-3
    )
    train_autoencoder(
        vae.decoder,
        ViTCodec(vae),
        optimizers,
        plan=TrainPlan(num_steps=work.steps["decoder"], decay_share=0.6, seed=1),
        checkpoint=work.checkpoint("decoder"),
        shapes=VAE_SHAPES,
        scene_share=DECODER_SCENES,
    )
    return vae.eval()


def encode_latents(work: Work) -> None:
    """Encode the clips that the transformer learns from."""
    codec = ViTCodec(train_vae(work))
    encode_bank(work, codec.encode, num_frames=CLIP_FRAMES, num_channels=LATENT_CHANNELS)


def train_dit(work: Work) -> DemoModels:
    """Train the base transformer with its text side, or load it if that is done."""
    models = new_models()
    bank = read_bank(work, **read_statistics(work))
    plan = TrainPlan(num_steps=work.steps["dit"], warmup_steps=100, decay_share=0.45)
    trainer = Trainer(models, _optimizers(models), plan=plan, checkpoint=work.checkpoint("dit"))
    trainer.run(BaseLoss(models, bank, forcing=FORCING))
    return models.eval().requires_grad_(False)


def refine_dit(work: Work) -> DemoModels:
    """Train the base transformer with its text side on, or load it if that is done."""
    models = train_dit(work).requires_grad_(True)
    bank = read_bank(work, **read_statistics(work))
    plan = TrainPlan(num_steps=work.steps["refine"], warmup_steps=50, decay_share=0.6, seed=3)
    trainer = Trainer(models, _optimizers(models), plan=plan, checkpoint=work.checkpoint("refine"))
    trainer.run(BaseLoss(models, bank, forcing=REFINE_FORCING, is_weighted=True))
    return models.eval().requires_grad_(False)


def _optimizers(models: DemoModels) -> list[torch.optim.Optimizer]:
    return new_optimizers(
        models.dit.named_parameters(),
        matrices_under=LAYERS,
        matrix_rate=0.02,
        rate=3e-3,
        others=[([*models.text.parameters(), models.tokens], 1e-3)],
    )


def distill(work: Work) -> DiT:
    """Teach a copy of the base transformer the guided velocity, or load it if that is done.

    The step size, which distilled models are told, is drawn at random and changes nothing here.
    """
    models = refine_dit(work)
    bank = read_bank(work, **read_statistics(work))
    student = copy.deepcopy(models.dit).requires_grad_(True)
    optimizers = new_optimizers(
        student.named_parameters(), matrices_under=LAYERS, matrix_rate=0.008, rate=1e-3
    )
    plan = TrainPlan(num_steps=work.steps["distill"], warmup_steps=30, decay_share=0.6, seed=2)
    trainer = Trainer(student, optimizers, plan=plan, checkpoint=work.checkpoint("distill"))
    trainer.run(DistillLoss(models, student, bank))
    return student.eval().requires_grad_(False)


def export(work: Work, folder: Path) -> dict[str, Any]:
    """Write the checkpoint folder from the trained parts; return what the record says of them."""
    vae, models, student = train_decoder(work), refine_dit(work), distill(work)
    psnr = measured_psnr(ViTCodec(vae), num_frames=CLIP_FRAMES)
    write_checkpoint(vae, models, student, statistics=read_statistics(work), folder=folder)
    return {
        **parts_record(work, vae=vae, transformer=models.dit, text_encoder=models.text, psnr=psnr),
        "refined_transformer": training_record(work, "refine"),
        "distilled_transformer": training_record(work, "distill"),
        "mixture": asdict(FORCING),
        "guidance_distilled": asdict(GUIDANCE),
    }


RECIPE = Recipe(
    shipped=Path(__file__).resolve().parents[2] / "FlowCache4MAGI-1" / "demo",
    default_steps={"vae": 1500, "decoder": 1800, "dit": 2400, "refine": 9000, "distill": 700},
    stages={
        "tokenizer": write_tokenizer,
        "vae": train_vae,
        "decoder": train_decoder,
        "latents": encode_latents,
        "dit": train_dit,
        "refine": refine_dit,
        "distill": distill,
    },
    export=export,
)
