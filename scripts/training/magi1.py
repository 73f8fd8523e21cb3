"""The recipe of the MAGI-1 demo: ViT VAE, base and distilled transformer, T5, special tokens.

Stages: `tokenizer`, `vae`, `decoder` (the VAE's decoder alone, on; may run beside the next two),
`latents` (encodes the clips the transformer learns from), `dit` (base
transformer, text encoder and special tokens), `refine` (the same, on, with smaller batches and a
loss that weights noise levels), `distill` (teaches a copy of the transformer to give
in one pass what guidance makes of the base model's passes).

Axes: B batch, N chunks, R text rows (B * N), L text tokens, C text width, F latent frames.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5EncoderModel

from flowcache.demo.autoencoder import BatchShape
from flowcache.demo.clips import FPS
from flowcache.demo.forcing import ForcingPlan, NoisyClips, draw_noisy, draw_window
from flowcache.demo.latents import LatentBank
from flowcache.demo.optim import Muon, split_parameters
from flowcache.demo.text import TEXT_WIDTH, build_tokenizer, new_t5_encoder
from flowcache.demo.trainer import StepRandomness, Trainer, TrainPlan
from magi1.captions import NULL_TOKENS, NUM_OTHER, SpecialTokens, TokenChoice, chunk_captions
from magi1.config import ModelConfig
from magi1.dit import DiT
from magi1.layers import Layer, SelfAttend
from magi1.sampling import Guidance
from magi1.schedule import step_width
from magi1.vit import VAEConfig, ViTVAE
from training.work import (
    Recipe,
    Work,
    count,
    drop_some,
    encode_bank,
    measured_psnr,
    move_over,
    new_temporary,
    read_bank,
    read_statistics,
    train_autoencoder,
    training_record,
    write_tokenizer,
)

CLIP_FRAMES = 144
TILE_FRAMES = 12
LATENT_CHANNELS = 16
CHUNK_WIDTH = 6
SCALE_FACTOR = 0.18215
CLEAN_T = 0.9999
VAE = VAEConfig(
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
VAE_SHAPES = (
    *[BatchShape(8, TILE_FRAMES)] * 3,
    BatchShape(8, 8),
    *[BatchShape(8, TILE_FRAMES)] * 3,
    BatchShape(16, 4, num_still=8),
)
VAE_SCENES = 0.1
DECODER_SCENES = 0.05
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
FORCING = ForcingPlan(
    num_frames=CHUNK_WIDTH * 6,
    chunk_frames=CHUNK_WIDTH,
    warp=2.0,
    lag_range=(0.2, 0.32),
    fewest_chunks=1,
    full_share=0.0,
    odd_chunk_share=0.0,
    image_share=0.0,
    staggered_share=0.7,
    together_share=0.2,
)
REFINE_FORCING = replace(FORCING, batch_frames=144)
# Share of the learning rates that refinement begins with.
REFINE_RATE = 1.0
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
    text_scales=(3.0, 3.0, 3.0, 1.5, 1.5),
)
STEP_COUNTS = (8, 16, 32, 64)
# Effective scale of the norms behind each branch before training.
_BRANCH_SCALE = 0.3


def new_vae() -> ViTVAE:
    """Make the untrained VAE, the same every time."""
    torch.manual_seed(0)
    vae = ViTVAE(VAE)
    for half in (vae.encoder, vae.decoder):
        nn.init.normal_(half.cls_token, std=0.02)
        for block in half.blocks:
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data.mul_(0.3)
                nn.init.zeros_(linear.bias)
    return vae


class ViTCodec:
    """The VAE's two directions, in tiles of 12 frames, with latents that are not normalised."""

    def __init__(self, vae: ViTVAE) -> None:
        self.vae = vae

    def encode(self, video_B3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to the posterior's mean, `[B, C, F, h, w]`."""
        tiles = video_B3THW.split(TILE_FRAMES, dim=2)
        return torch.cat([self.vae.moments(tile)[0] for tile in tiles], dim=2)

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Decode latents to pixels `[B, 3, T, H, W]` in -1..1."""
        tiles = latents_BCFhw.split(TILE_FRAMES // VAE.patch_length, dim=2)
        return torch.cat([self.vae.decoder(tile) for tile in tiles], dim=2)


def train_vae(work: Work) -> ViTVAE:
    """Train the VAE, or load it if that is done; returns it with averaged weights."""
    vae = new_vae()
    inside = ("encoder.blocks", "decoder.blocks")
    matrices, rest = split_parameters(vae.named_parameters(), matrices_under=inside)
    train_autoencoder(
        vae,
        ViTCodec(vae),
        [Muon(matrices, 0.02), torch.optim.AdamW(rest, 2e-3, betas=(0.9, 0.95), weight_decay=0)],
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
    matrices, rest = split_parameters(vae.decoder.named_parameters(), matrices_under=("blocks",))
    train_autoencoder(
        vae.decoder,
        ViTCodec(vae),
        [Muon(matrices, 0.015), torch.optim.AdamW(rest, 1.5e-3, betas=(0.9, 0.95), weight_decay=0)],
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


class DemoModels(nn.Module):
    """The transformer, the text encoder and the special tokens, which are trained together.

    Untrained, the transformer is silent: its output is zero, and its branches begin small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiT(DIT)
        self.text = new_t5_encoder(vocabulary_size=len(build_tokenizer()))
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


def new_models() -> DemoModels:
    """Make the untrained models, the same every time."""
    torch.manual_seed(0)
    return DemoModels()


def train_dit(work: Work) -> DemoModels:
    """Train the base transformer with its text side, or load it if that is done."""
    models = new_models()
    bank = read_bank(work, **read_statistics(work))
    plan = TrainPlan(num_steps=work.steps["dit"], warmup_steps=100, decay_share=0.45)
    optimizers = model_optimizers(models, rate=1.0)
    trainer = Trainer(models, optimizers, plan=plan, checkpoint=work.checkpoint("dit"))
    trainer.run(BaseLoss(models, bank, forcing=FORCING))
    return models.eval().requires_grad_(False)


def refine_dit(work: Work) -> DemoModels:
    """Train the base transformer with its text side on, or load it if that is done."""
    models = train_dit(work).requires_grad_(True)
    bank = read_bank(work, **read_statistics(work))
    plan = TrainPlan(num_steps=work.steps["refine"], warmup_steps=50, decay_share=0.6, seed=3)
    optimizers = model_optimizers(models, rate=REFINE_RATE)
    trainer = Trainer(models, optimizers, plan=plan, checkpoint=work.checkpoint("refine"))
    trainer.run(BaseLoss(models, bank, forcing=REFINE_FORCING, is_weighted=True))
    return models.eval().requires_grad_(False)


def model_optimizers(models: DemoModels, *, rate: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside the layers and AdamW for the rest.

    Args:
        rate: factor on the learning rates.
    """
    matrices, rest = split_parameters(
        models.dit.named_parameters(), matrices_under=("videodit_blocks.layers.",)
    )
    text = [*models.text.parameters(), models.tokens]
    groups = [{"params": rest, "lr": 3e-3 * rate}, {"params": text, "lr": 1e-3 * rate}]
    return [
        Muon(matrices, 0.02 * rate),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0),
    ]


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
        size = min(self.forcing.largest_batch, self.forcing.batch_frames // window.num_frames)
        latents, captions = self.bank.batch(rng, size)
        now = Situation(
            captions=self.encode(rng, captions, num_chunks=num_chunks),
            is_null=bool(rng.random() < NULL_SHARE),
            reach=int(rng.integers(1, 6)) if rng.random() < LIMITED_SHARE else None,
        )
        num_fixed = 0
        if rng.random() < FIXED_SHARE:
            num_fixed = int(rng.choice(FIXED_LATENTS if num_chunks > 1 else FIXED_LATENTS[:2]))
        clips = draw_noisy(
            latents[:, :, : window.num_frames],
            window,
            plan=self.forcing,
            randomness=randomness,
            num_fixed=num_fixed,
        )
        return now, clips

    def encode(
        self, rng: np.random.Generator, captions: list[str], *, num_chunks: int
    ) -> tuple[Tensor, Tensor]:
        """Encode captions to what each chunk is told, padded to `NULL_TOKENS`."""
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

    Near 1 the place of the shape is open, near 0 the noise is; both would outweigh the rest.
    """
    return 4 * sigma * (1 - sigma) + 0.1


def predict(
    dit: DiT,
    clips: NoisyClips,
    now: Situation,
    *,
    is_null: bool,
    step_width: float | None = None,
) -> Tensor:
    """Predict the velocity, data minus noise; chunks that are clean are told no text."""
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


def _limited(dit: DiT, *, num_chunks: int, reach: int | None) -> SelfAttend | None:
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


def distill(work: Work) -> DiT:
    """Teach a copy of the base transformer the guided velocity, or load it if that is done.

    The step size, which distilled models are told, is drawn at random and changes nothing here.
    """
    models = refine_dit(work)
    bank = read_bank(work, **read_statistics(work))
    student = copy.deepcopy(models.dit).requires_grad_(True)
    matrices, rest = split_parameters(
        student.named_parameters(), matrices_under=("videodit_blocks.layers.",)
    )
    optimizers = [
        Muon(matrices, 0.005),
        torch.optim.AdamW(rest, 7e-4, betas=(0.9, 0.95), weight_decay=0),
    ]
    plan = TrainPlan(num_steps=work.steps["distill"], warmup_steps=30, decay_share=0.6, seed=2)
    trainer = Trainer(student, optimizers, plan=plan, checkpoint=work.checkpoint("distill"))
    trainer.run(DistillLoss(models, student, bank))
    return student.eval().requires_grad_(False)


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


def export(work: Work, folder: Path) -> dict[str, Any]:
    """Write the checkpoint folder from the trained parts; return what the record says of them."""
    vae, models, student = train_decoder(work), refine_dit(work), distill(work)
    psnr = measured_psnr(ViTCodec(vae), num_frames=CLIP_FRAMES)
    num_parameters = {
        "vae": count(vae),
        "transformer": count(models.dit),
        "text_encoder": count(models.text),
    }
    write_checkpoint(vae, models, student, statistics=read_statistics(work), folder=folder)
    return {
        "num_parameters": num_parameters,
        "vae": training_record(work, "vae"),
        "decoder": training_record(work, "decoder"),
        "vae_psnr_db_on_unseen_clips": psnr,
        "transformer": training_record(work, "dit"),
        "refined_transformer": training_record(work, "refine"),
        "distilled_transformer": training_record(work, "distill"),
        "mixture": asdict(FORCING),
        "guidance_distilled": asdict(GUIDANCE),
    }


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


RECIPE = Recipe(
    shipped=Path(__file__).resolve().parents[2] / "FlowCache4MAGI-1" / "demo",
    default_steps={"vae": 1500, "decoder": 1800, "dit": 2400, "refine": 4900, "distill": 300},
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
