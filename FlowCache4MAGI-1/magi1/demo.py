"""How the demo checkpoint is trained: ViT VAE, base and distilled transformer, T5, special tokens.

Stages: `tokenizer`, `vae`, `decoder` (the VAE's decoder alone, on; may run during the next two),
`latents` (encodes the clips the transformer learns from), `dit` (base transformer, text encoder and
special tokens), `refine` (the same, on, with smaller batches and a loss that weights noise levels),
`distill` (teaches a copy of the transformer to give in one pass what guidance makes of the base
model's passes). `scripts/train_demo.py` runs them.

Axes: B batch, N chunks, R text rows (B * N), L text tokens, F latent frames, C latent channels or
text width.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from flowcache.demo.clips import FPS
from flowcache.demo.forcing import ForcingPlan, NoisyClips, draw_levels, draw_noisy, draw_window
from flowcache.demo.latents import (
    LatentBank,
    Statistics,
    drop_some,
    read_bank,
    read_statistics,
)
from flowcache.demo.optim import new_optimizers
from flowcache.demo.recipe import Recipe, Training, VAERecipe, new_files, write_tokenizer
from flowcache.demo.text import TEXT_WIDTH, build_tokenizer, new_t5_encoder, start_encoder
from flowcache.demo.trainer import StepRandomness, Trainer, TrainPlan
from flowcache.demo.vae import BatchShape, ClipMixture
from flowcache.kv import Attend
from magi1.config import ModelConfig, TokenChoice
from magi1.dit import DiT, Layer
from magi1.sampling import Guidance
from magi1.schedule import step_width
from magi1.text import (
    NULL_TOKENS,
    NUM_OTHER,
    SpecialTokens,
    chunk_captions,
    load_special_tokens,
)
from magi1.vae import Block, VAEConfig, ViTVAE

TILE_FRAMES = 12
LATENT_CHANNELS = 16
CHUNK_WIDTH = 6
VAE_CONFIG = VAEConfig(
    video_size=64,
    video_length=TILE_FRAMES,
    z_chans=LATENT_CHANNELS,
    embed_dim=128,
    depth=3,
    num_heads=4,
    qkv_bias=True,
    ln_in_attn=True,
    conv_last_layer=True,
    use_final_proj=True,
)
DIT = ModelConfig(
    model_name="videodit_ardf",
    num_layers=6,
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    layernorm_epsilon=1e-6,
    apply_layernorm_1p=True,
    x_rescale_factor=1.0,
    half_channel_vae=False,
    params_dtype="torch.float32",
    patch_size=2,
    t_patch_size=1,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    cond_hidden_ratio=0.25,
    caption_channels=TEXT_WIDTH,
    caption_max_length=64,
    xattn_cond_hidden_ratio=1.0,
    cond_gating_ratio=1.0,
    gated_linear_unit=False,
)
VAE_SHAPES = (
    *[BatchShape(8, TILE_FRAMES)] * 3,
    BatchShape(8, 8),
    *[BatchShape(8, TILE_FRAMES)] * 3,
    BatchShape(16, 4, num_still=8),
)
LAYERS = ("videodit_blocks.layers.",)
# Effective scale of the norms behind each branch before training.
_BRANCH_SCALE = 0.3
CLEAN_T = 0.9999
FORCING = ForcingPlan(
    num_frames=CHUNK_WIDTH * 6,
    chunk_frames=CHUNK_WIDTH,
    warp=2.0,
    lag_range=(0.2, 0.32),
    fewest_chunks=1,
    short_share=0.7,
    single_share=0.6,
    full_share=0.0,
    odd_chunk_share=0.0,
    image_share=0.0,
    staggered_share=0.7,
    together_share=0.2,
)
REFINE_FORCING = replace(FORCING, batch_frames=96, short_share=0.8, single_share=0.75)
# Shares of the steps without any caption, with given latents in the first noisy chunk, and with a
# limited reach.
NULL_SHARE = 0.12
FIXED_SHARE = 0.15
FIXED_LATENTS = (1, 2, 8)
LIMITED_SHARE = 0.3
# Share of the steps without special tokens, as a run without their file has.
PLAIN_SHARE = 0.15
MOST_REMAINING = 4
GUIDANCE = Guidance(
    t_range=(0.0, 0.0217, 0.1, 0.3, 0.999),
    prev_scales=(1.0, 1.0, 1.0, 1.0, 1.0),
    text_scales=(3.0, 3.0, 2.0, 1.0, 1.0),
)
STEP_COUNTS = (8, 16, 32, 64)
SCALE_FACTOR = 0.18215
VAE_FILE = "ckpt/vae/diffusion_pytorch_model.safetensors"
BASE_FILE = "ckpt/magi/base/inference_weight/model.safetensors"
TEXT_FOLDER = "ckpt/t5/t5-v1_1-xxl"
TOKENS_FILE = "special_tokens.npz"
"""In the exported folder, named as the released files are."""


def new_vae(start: Path | None = None) -> ViTVAE:
    """Make a VAE to train.

    Args:
        start: checkpoint folder with its weights; None: untrained, the same every time.
    """
    torch.manual_seed(0)
    vae = ViTVAE(VAE_CONFIG)
    for half in (vae.encoder, vae.decoder):
        nn.init.normal_(half.cls_token, std=0.02)
        for block in half.blocks:
            assert isinstance(block, Block)
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data.mul_(0.3)
                nn.init.zeros_(linear.bias)
    if start is not None:
        vae.load_state_dict(load_file(start / VAE_FILE))
    return vae


class ViTCodec:
    """The VAE's two directions, in tiles of 12 frames, with latents that are not normalised."""

    def __init__(self, vae: ViTVAE) -> None:
        self.vae = vae

    def encode(self, video_B3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to the posterior's mean, `[B, C, F, h, w]`."""
        tiles = video_B3THW.split(TILE_FRAMES, dim=2)
        return torch.cat([self.vae.means(tile) for tile in tiles], dim=2)

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Decode latents to pixels `[B, 3, T, H, W]` in -1..1."""
        tiles = latents_BCFhw.split(TILE_FRAMES // VAE_CONFIG.patch_length, dim=2)
        return torch.cat([self.vae.decoder(tile) for tile in tiles], dim=2)


VAE = VAERecipe(
    new=new_vae,
    codec=ViTCodec,
    decoder=lambda vae: vae.decoder,
    optimizers=lambda vae: new_optimizers(
        vae.named_parameters(),
        matrices_under=("encoder.blocks", "decoder.blocks"),
        matrix_rate=0.02,
        rate=2e-3,
    ),
    decoder_optimizers=lambda vae: new_optimizers(
        vae.decoder.named_parameters(), matrices_under=("blocks",), matrix_rate=0.015, rate=1.5e-3
    ),
    clips=ClipMixture(VAE_SHAPES, crowd_share=0.1),
    decoder_clips=ClipMixture(VAE_SHAPES, crowd_share=0.05),
    clip_frames=144,
)


class DemoModels(nn.Module):
    """The transformer, the text encoder and the special tokens, which are trained together.

    Untrained, the transformer is silent: its output is zero, and its branches begin small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiT(DIT)
        self.text = new_t5_encoder()
        self.tokens = nn.Parameter(torch.randn(2 + NUM_OTHER, TEXT_WIDTH))
        nn.init.zeros_(self.dit.final_linear.linear.weight)
        for layer in self.dit.videodit_blocks.layers:
            assert isinstance(layer, Layer)
            gate = layer.ada_modulate_layer.proj[0]
            assert isinstance(gate, nn.Linear)
            nn.init.zeros_(gate.weight)
            nn.init.ones_(gate.bias)
            for norm in (layer.self_attn_post_norm, layer.mlp_post_norm):
                nn.init.constant_(norm.weight, _BRANCH_SCALE - 1)

    @property
    def special_tokens(self) -> SpecialTokens:
        """The learned tokens in the layout of the release."""
        return SpecialTokens(self.tokens[:1], self.tokens[1:2], self.tokens[2:])


def new_models(start: Path | None = None) -> DemoModels:
    """Make the models to train.

    Args:
        start: checkpoint folder with their weights; None: untrained, the same every time.
    """
    torch.manual_seed(0)
    models = DemoModels()
    if start is not None:
        models.dit.load_state_dict(load_file(start / BASE_FILE))
        text = start / TEXT_FOLDER
        start_encoder(models.text, folder=text, tokenizer=text / "tokenizer.json")
        tokens = load_special_tokens(start / TOKENS_FILE, channels=TEXT_WIDTH)
        models.tokens.data = torch.cat([tokens.caption, tokens.logo, tokens.other]).float()
    return models


@dataclass(frozen=True)
class Situation:
    """What one training step looks like.

    Attributes:
        captions: text of every chunk, `[R, L, C]`, and which tokens count, `[R, L]`.
        is_null: whether all captions are left out.
        reach: chunks that a chunk sees, itself included; None: all before it.
    """

    captions: tuple[Tensor, Tensor]
    is_null: bool
    reach: int | None


class BaseLoss:
    """The loss of a training step of the base model."""

    def __init__(
        self,
        models: DemoModels,
        bank: LatentBank,
        *,
        forcing: ForcingPlan,
        is_weighted: bool = False,
    ) -> None:
        self.models, self.bank = models, bank
        self.forcing, self.is_weighted = forcing, is_weighted
        self.tokenizer = build_tokenizer()

    def __call__(self, _step: int, randomness: StepRandomness) -> Tensor:
        now, clips = self.draw(randomness)
        data_minus_noise = predict(self.models.dit, clips, now, is_null=now.is_null)
        error_BCFhw = data_minus_noise + clips.target
        if self.is_weighted:
            error_BCFhw = error_BCFhw * level_weights(clips.sigma).sqrt()[:, None, :, None, None]
        return clips.mean_square(error_BCFhw)

    def draw(self, randomness: StepRandomness) -> tuple[Situation, NoisyClips]:
        """Draw a step."""
        rng = randomness.numpy
        window = draw_window(rng, self.forcing)
        num_chunks = len(window.bounds)
        levels = draw_levels(rng, window, self.forcing)
        latents, captions = self.bank.batch(rng, ~levels.shows_motion)
        now = Situation(
            captions=self.encode(rng, captions, num_chunks=num_chunks),
            is_null=bool(rng.random() < NULL_SHARE),
            reach=int(rng.integers(2, 6)) if rng.random() < LIMITED_SHARE else None,
        )
        num_fixed = 0
        if rng.random() < FIXED_SHARE:
            num_fixed = int(rng.choice(FIXED_LATENTS if num_chunks > 1 else FIXED_LATENTS[:2]))
        clips = draw_noisy(
            latents, window, levels=levels, randomness=randomness, num_fixed=num_fixed
        )
        return now, clips

    def encode(
        self, rng: np.random.Generator, captions: list[str], *, num_chunks: int
    ) -> tuple[Tensor, Tensor]:
        """Encode captions to the text of each chunk, padded to `NULL_TOKENS`."""
        tokens = None if rng.random() < PLAIN_SHARE else self.models.special_tokens
        num_later = int(rng.integers(MOST_REMAINING + 1))
        given = self.tokenizer(drop_some(rng, captions), padding=True, return_tensors="pt")
        states_BLC = self.models.text(
            input_ids=given.input_ids, attention_mask=given.attention_mask
        ).last_hidden_state
        texts: list[Tensor] = []
        for states_LC, length in zip(states_BLC, given.attention_mask.sum(1), strict=True):
            texts += chunk_captions(
                states_LC[:length],
                num_chunks=num_chunks + num_later,
                tokens=tokens,
                choice=TokenChoice(),
                max_length=NULL_TOKENS,
            )[:num_chunks]
        lengths = torch.tensor([len(text) for text in texts])
        rows = [functional.pad(text, (0, 0, 0, NULL_TOKENS - len(text))) for text in texts]
        return torch.stack(rows), torch.arange(NULL_TOKENS) < lengths[:, None]


def level_weights(sigma: Tensor) -> Tensor:
    """Return the weight of an error by noise level: what can't be known weighs little.

    Near 1 the place of the shape is open, near 0 the noise is; both would outweigh the rest. At 0.9
    the place shows and the direction does not: that is where it is learned from the caption.
    """
    return (12 * (1 - sigma)).clamp(max=1) * (4 * sigma).clamp(max=1) + 0.1


def predict(
    dit: DiT,
    clips: NoisyClips,
    now: Situation,
    *,
    is_null: bool,
    step_width: float | None = None,
) -> Tensor:
    """Predict the velocity, data minus noise; clean chunks get no text."""
    t_BN = 1 - clips.sigma[:, ::CHUNK_WIDTH]
    text_RLC, mask_RL = now.captions
    is_silent_R = (t_BN == 1).flatten() | is_null
    text_RLC = torch.where(is_silent_R[:, None, None], dit.null_caption[:NULL_TOKENS], text_RLC)
    return dit(
        clips.x,
        t_BN.clamp(max=CLEAN_T),
        text_RLC,
        mask_RL=mask_RL | is_silent_R[:, None],
        is_null=is_null,
        step_width=step_width,
        self_attend=_limited(dit, num_chunks=t_BN.shape[1], reach=now.reach),
    )


def _limited(dit: DiT, *, num_chunks: int, reach: int | None) -> Attend | None:
    """Let every chunk attend to the last `reach` chunks, itself included."""
    if reach is None:
        return None

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[1] // num_chunks
        stops = range(size, q.shape[1] + 1, size)
        seen = [slice(max(0, stop - reach * size), stop) for stop in stops]
        parts = [
            dit.kernel(q[:, stop - size : stop], k[:, own], v[:, own])
            for stop, own in zip(stops, seen, strict=True)
        ]
        return torch.cat(parts, dim=1)

    return attend


class DistillLoss(BaseLoss):
    """The squared distance of the student's velocity to the guided one of the base model."""

    def __init__(self, models: DemoModels, student: DiT, bank: LatentBank) -> None:
        super().__init__(models, bank, forcing=REFINE_FORCING)
        self.student = student

    def __call__(self, _step: int, randomness: StepRandomness) -> Tensor:
        with torch.no_grad():
            now, clips = self.draw(randomness)
            guided = self.guided(clips, now)
        width = step_width(int(randomness.numpy.choice(STEP_COUNTS)), interval=1.0)
        taught = predict(self.student, clips, now, is_null=False, step_width=width)
        return clips.mean_square(taught - guided)

    def guided(self, clips: NoisyClips, now: Situation) -> Tensor:
        """Return what guidance makes of the base model's passes with and without text."""
        with_text = predict(self.models.dit, clips, now, is_null=False)
        without = predict(self.models.dit, clips, now, is_null=True)
        scales = [[GUIDANCE.scales(1 - sigma)[1] for sigma in row] for row in clips.sigma.tolist()]
        return without + torch.tensor(scales)[:, None, :, None, None] * (with_text - without)


def train_dit(training: Training) -> DemoModels:
    """Train the base transformer with its text side, or load it if that is done."""
    models = new_models(training.start)
    plan = TrainPlan(
        num_steps=training.steps["dit"],
        warmup_steps=100,
        decay_share=0.45,
        rate=training.rate("transformer"),
    )
    _train_base(models, training, "dit", plan=plan, forcing=FORCING)
    return models.eval().requires_grad_(False)


def refine_dit(training: Training) -> DemoModels:
    """Train the base transformer with its text side on, or load it if that is done."""
    models = train_dit(training).requires_grad_(True)
    plan = TrainPlan(
        num_steps=training.steps["refine"],
        warmup_steps=50,
        decay_share=0.6,
        rate=training.rate("transformer"),
        seed=3,
    )
    _train_base(models, training, "refine", plan=plan, forcing=REFINE_FORCING, is_weighted=True)
    return models.eval().requires_grad_(False)


def _train_base(
    models: DemoModels,
    training: Training,
    stage: str,
    *,
    plan: TrainPlan,
    forcing: ForcingPlan,
    is_weighted: bool = False,
) -> None:
    bank = read_bank(training.out)
    optimizers = new_optimizers(
        models.dit.named_parameters(),
        matrices_under=LAYERS,
        matrix_rate=0.02,
        rate=3e-3,
        others=[([*models.text.parameters(), models.tokens], 1e-3)],
    )
    trainer = Trainer(models, optimizers, plan=plan, checkpoint=training.checkpoint(stage))
    trainer.run(BaseLoss(models, bank, forcing=forcing, is_weighted=is_weighted))


def distill(training: Training) -> DiT:
    """Teach a copy of the base transformer the guided velocity, or load it if that is done.

    The step size, an input of distilled models, is drawn at random and changes nothing here.
    """
    models = refine_dit(training)
    bank = read_bank(training.out)
    student = copy.deepcopy(models.dit).requires_grad_(True)
    optimizers = new_optimizers(
        student.named_parameters(), matrices_under=LAYERS, matrix_rate=0.008, rate=1e-3
    )
    plan = TrainPlan(num_steps=training.steps["distill"], warmup_steps=30, decay_share=0.6, seed=2)
    trainer = Trainer(student, optimizers, plan=plan, checkpoint=training.checkpoint("distill"))
    trainer.run(DistillLoss(models, student, bank))
    return student.eval().requires_grad_(False)


def export(training: Training, folder: Path) -> dict[str, Any]:
    """Write the checkpoint folder from the trained parts; return what the record says of them."""
    vae, models = VAE.train_decoder(training), refine_dit(training)
    student, psnr = distill(training), VAE.psnr(vae)
    write_checkpoint(vae, models, student, statistics=read_statistics(training.out), folder=folder)
    return {
        **training.parts_record(
            vae=vae, transformer=models.dit, text_encoder=models.text, psnr=psnr
        ),
        "refined_transformer": training.record("refine"),
        "distilled_transformer": training.record("distill"),
        "mixture": asdict(FORCING),
        "refined_mixture": asdict(REFINE_FORCING),
        "guidance_distilled": asdict(GUIDANCE),
    }


def write_checkpoint(
    vae: ViTVAE, models: DemoModels, student: DiT, *, statistics: Statistics, folder: Path
) -> None:
    """Write all parts in float16 in the layout of the release; a reader never sees half a file."""
    fold_statistics(vae, statistics)
    vae_config = {"_class_name": "ViTVAE", "model_type": "vit", "ddconfig": asdict(VAE_CONFIG)}
    tokens = models.tokens.detach().double().numpy()
    with new_files(folder) as made:
        _save(vae, made / VAE_FILE)
        _write_json(made / "ckpt/vae/config.json", vae_config)
        _save(models.dit, made / BASE_FILE)
        _save(student, made / "ckpt/magi/distill/inference_weight.distill/model.safetensors")
        for part in (models.text.half(), build_tokenizer()):
            part.save_pretrained(made / TEXT_FOLDER)
        np.savez_compressed(
            made / TOKENS_FILE,
            caption_token=tokens[:1],
            logo_token=tokens[1:2],
            other_tokens=tokens[2:],
        )
        for name, config in released_configs().items():
            _write_json(made / f"{name}_config.json", config)


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
        "temporal_downsample_factor": VAE_CONFIG.patch_length,
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


def fold_statistics(vae: ViTVAE, statistics: Statistics) -> None:
    """Change a VAE so that its scaled latents have mean 0 and deviation 1, in place.

    The release scales all channels by one factor, so what differs between them goes into the last
    layer of the encoder and the first of the decoder.
    """
    scale, shift = torch.tensor(statistics.std) * SCALE_FACTOR, torch.tensor(statistics.mean)
    with torch.no_grad():
        last, first = vae.encoder.last_layer, vae.decoder.proj_in
        last.bias[:LATENT_CHANNELS] -= shift
        last.bias[:LATENT_CHANNELS] /= scale
        last.weight[:LATENT_CHANNELS] /= scale[:, None]
        first.bias.add_(first.weight @ shift)
        first.weight.mul_(scale)


def _save(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


RECIPE = Recipe(
    shipped=Path(__file__).resolve().parents[1] / "demo",
    default_steps={"vae": 1500, "decoder": 1800, "dit": 2400, "refine": 14000, "distill": 700},
    stages={
        "tokenizer": write_tokenizer,
        "vae": VAE.train,
        "decoder": VAE.train_decoder,
        "latents": VAE.encode_latents,
        "dit": train_dit,
        "refine": refine_dit,
        "distill": distill,
    },
    export=export,
)
