"""How the demo checkpoint is trained: Wan VAE, transformer and UMT5, `*-Diffusers` layout.

Stages: `tokenizer`, `vae`, `decoder` (the VAE's decoder alone, on; may run during the next two),
`latents` (encodes the clips the transformer learns from), `dit` (transformer and text encoder),
`refine` (the same, on, with smaller batches).
`scripts/train_demo.py` runs them.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from flowcache.demo.forcing import ForcingPlan, draw_levels, draw_noisy, draw_window
from flowcache.demo.latents import (
    LatentBank,
    Statistics,
    drop_some,
    read_bank,
    read_statistics,
)
from flowcache.demo.optim import new_optimizers
from flowcache.demo.recipe import Recipe, Training, VAERecipe, new_files, write_tokenizer
from flowcache.demo.text import (
    TEXT_LEN,
    TEXT_WIDTH,
    build_tokenizer,
    encode_captions,
    new_umt5_encoder,
    start_encoder,
)
from flowcache.demo.trainer import StepRandomness, Trainer, TrainPlan
from flowcache.demo.vae import ClipMixture
from flowcache.demo.wan_vae import BATCH_SHAPES, WanCodec, new_vae, vae_optimizers
from flowcache.wan.checkpoint import diffusers_key
from flowcache.wan.dit import Block, DiT, DiTConfig

FORCING = ForcingPlan(num_frames=25, chunk_frames=5)
REFINE_FORCING = replace(
    FORCING, batch_frames=75, short_share=0.6, single_share=0.6, full_share=0.35
)
DIT = DiTConfig(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    num_layers=6,
    text_dim=TEXT_WIDTH,
    text_len=TEXT_LEN,
    inject_sample_info=True,
)


def decoder_of(vae: AutoencoderKLWan) -> nn.ModuleDict:
    """Return the parts of the VAE that turn latents into pixels."""
    return nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})


VAE = VAERecipe(
    new=new_vae,
    codec=WanCodec,
    decoder=decoder_of,
    optimizers=vae_optimizers,
    decoder_optimizers=lambda vae: vae_optimizers(vae, rate=0.5),
    # crowds of shapes teach fast, the real clips teach exactly
    clips=ClipMixture(BATCH_SHAPES, crowd_share=0.5),
    decoder_clips=ClipMixture(BATCH_SHAPES, crowd_share=0.1),
    clip_frames=97,
)


class DemoModels(nn.Module):
    """The transformer and the text encoder, which are trained together.

    Untrained, the transformer is silent: its gates, its cross-attention and its head are zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiT(DIT)
        self.text = new_umt5_encoder()
        silent = [self.dit.time_projection[1], self.dit.fps_projection[2], self.dit.head.head]
        for block in self.dit.blocks:
            assert isinstance(block, Block)
            block.modulation.data.zero_()
            silent.append(block.cross_attn.o)
        for param in [param for layer in silent for param in layer.parameters()]:
            param.data.zero_()

    @classmethod
    def new(cls, start: Path | None) -> "DemoModels":
        """Make the models that training begins with.

        Args:
            start: checkpoint folder with their weights; None: untrained, the same every time.
        """
        torch.manual_seed(0)
        models = cls()
        if start is not None:
            saved = load_file(start / "transformer" / "diffusion_pytorch_model.safetensors")
            models.dit.load_state_dict(
                {key: saved[diffusers_key(key)] for key in models.dit.state_dict()}
            )
            start_encoder(
                models.text,
                folder=start / "text_encoder",
                tokenizer=start / "tokenizer" / "tokenizer.json",
            )
        return models

    @classmethod
    def trained(cls, training: Training) -> "DemoModels":
        """Train transformer and text encoder, or load them if that is done; averaged weights."""
        models = cls.new(training.start)
        plan = TrainPlan(
            num_steps=training.steps["dit"],
            warmup_steps=100,
            decay_share=0.45,
            rate=training.rate("transformer"),
        )
        return models._train(training, "dit", plan=plan, forcing=FORCING)

    @classmethod
    def refined(cls, training: Training) -> "DemoModels":
        """Train them on, on small batches, or load them if that is done; averaged weights."""
        models = cls.trained(training).requires_grad_(True)
        plan = TrainPlan(
            num_steps=training.steps["refine"],
            warmup_steps=50,
            decay_share=0.6,
            rate=training.rate("transformer"),
            seed=3,
        )
        return models._train(training, "refine", plan=plan, forcing=REFINE_FORCING)

    def _train(
        self, training: Training, stage: str, *, plan: TrainPlan, forcing: ForcingPlan
    ) -> "DemoModels":
        optimizers = new_optimizers(
            self.dit.named_parameters(),
            matrices_under=("blocks.",),
            matrix_rate=0.02,
            rate=3e-3,
            others=[([*self.text.parameters()], 1e-3)],
        )
        trainer = Trainer(self, optimizers, plan=plan, checkpoint=training.checkpoint(stage))
        trainer.run(_DitLoss(self, read_bank(training.out), forcing=forcing))
        return self.eval().requires_grad_(False)

    def write(self, vae: AutoencoderKLWan, *, statistics: Statistics, folder: Path) -> None:
        """Write all parts in float16 in the `*-Diffusers` layout; a reader never sees half a file.

        The transformer is saved by diffusers' own class, so the layout is the official one.
        """
        vae.register_to_config(latents_mean=statistics.mean, latents_std=statistics.std)
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000
        )
        parts = {
            "vae": vae.half(),
            "transformer": as_diffusers(self.dit).half(),
            "text_encoder": self.text.half(),
            "tokenizer": build_tokenizer(),
            "scheduler": scheduler,
        }
        index = {
            "_class_name": "SkyReelsV2DiffusionForcingPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "UniPCMultistepScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "SkyReelsV2Transformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLWan"],
        }
        with new_files(folder) as made:
            for name, part in parts.items():
                part.save_pretrained(made / name)
            (made / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


class _DitLoss:
    """The loss of a training step of the transformer."""

    def __init__(self, models: DemoModels, bank: LatentBank, *, forcing: ForcingPlan) -> None:
        self.models, self.bank, self.forcing = models, bank, forcing
        self.tokenizer = build_tokenizer()

    def __call__(self, _step: int, randomness: StepRandomness) -> Tensor:
        rng = randomness.numpy
        window = draw_window(rng, self.forcing)
        levels = draw_levels(rng, window, self.forcing)
        latents_BCFhw, captions = self.bank.batch(rng, ~levels.shows_motion)
        text_BLD = encode_captions(self.models.text, self.tokenizer, drop_some(rng, captions))
        clips = draw_noisy(latents_BCFhw, window, levels=levels, randomness=randomness)
        bounds = window.bounds if window.is_causal else None
        velocity = self.models.dit(clips.x, 1000 * clips.sigma, text_BLD, causal_chunks=bounds)
        return clips.mean_square(velocity - clips.target)


def _export(training: Training, folder: Path) -> dict[str, Any]:
    """Write the checkpoint folder from the trained parts; return what the record says of them."""
    vae, models = VAE.train_decoder(training), DemoModels.refined(training)
    psnr = VAE.psnr(vae)
    models.write(vae, statistics=read_statistics(training.out), folder=folder)
    return {
        **training.parts_record(
            vae=vae, transformer=models.dit, text_encoder=models.text, psnr=psnr
        ),
        "refined_transformer": training.record("refine"),
        "mixture": asdict(FORCING),
        "refined_mixture": asdict(REFINE_FORCING),
    }


def as_diffusers(dit: DiT) -> SkyReelsV2Transformer3DModel:
    """Copy our transformer into diffusers' class."""
    config = dit.config
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_width,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
        inject_sample_info=config.inject_sample_info,
    )
    model.load_state_dict({diffusers_key(key): value for key, value in dit.state_dict().items()})
    return model


RECIPE = Recipe(
    shipped=Path(__file__).resolve().parents[1] / "demo",
    default_steps={"vae": 850, "decoder": 1650, "dit": 3000, "refine": 14000},
    stages={
        "tokenizer": write_tokenizer,
        "vae": VAE.train,
        "decoder": VAE.train_decoder,
        "latents": VAE.encode_latents,
        "dit": DemoModels.trained,
        "refine": DemoModels.refined,
    },
    export=_export,
)
