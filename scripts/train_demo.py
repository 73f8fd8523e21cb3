"""Train a demo checkpoint from nothing: draw clips, train a VAE, encode, train the transformer.

    python scripts/train_demo.py --model skyreels_v2 --out build/demo            everything
    python scripts/train_demo.py --model skyreels_v2 --out build/demo --stage vae   one stage

Every stage saves what it has reached under --out and goes on from there when it is started again,
also after a kill; a finished stage is a no-op. A longer --vae-steps or --dit-steps prolongs a
training that is not yet finished. Nothing is downloaded. One thread trains a checkpoint in about
two hours on one CPU core.

Stages: `tokenizer` writes the tokenizer, `vae` trains the VAE, `decoder` trains its decoder on (may
run beside the next two), `latents` encodes the clips the transformer learns from, `dit` trains the
transformer and the text encoder together, `export` writes the checkpoint folder (`*-Diffusers`
layout) and its training.json.
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from flowcache.demo.clips import split_attributes
from flowcache.demo.forcing import ForcingPlan, draw_window, forcing_loss
from flowcache.demo.latents import LatentBank, encode_shards, load_bank, measure_channels
from flowcache.demo.optim import Muon, split_parameters
from flowcache.demo.text import (
    TEXT_LEN,
    TEXT_WIDTH,
    build_tokenizer,
    encode_captions,
    new_text_encoder,
)
from flowcache.demo.trainer import StepRandomness, Trainer, TrainPlan
from flowcache.demo.vae import encode, new_vae, to_signed, vae_loss, vae_optimizers, vae_psnr
from skyreels_v2.checkpoint import diffusers_key
from skyreels_v2.dit import DiT, DiTConfig
from skyreels_v2.layers import Block

logger = logging.getLogger("train_demo")
SHIPPED = Path(__file__).resolve().parents[1] / "FlowCache4SkyReels-V2" / "demo"
STAGES = ("tokenizer", "vae", "decoder", "latents", "dit", "export", "all")
CLIP_FRAMES = 97
FORCING = ForcingPlan(num_frames=25, chunk_frames=5)
DIT = DiTConfig(
    dim=128,
    ffn_dim=512,
    num_heads=4,
    num_layers=6,
    text_dim=TEXT_WIDTH,
    text_len=TEXT_LEN,
    inject_sample_info=True,
)
CAPTION_DROP = 0.1
# Share of the VAE's learning rates that its decoder begins its further training with.
DECODER_RATE = 0.5
# Shares of many-shaped scenes among the clips: they teach fast, the real clips teach exactly.
VAE_SCENES = 0.5
DECODER_SCENES = 0.1
# Clips the latent statistics are measured on: the first shards of the bank.
STATISTICS_CLIPS = 200
VAE_TEST_CLIPS = 24
# Steps the final loss is averaged over.
_FINAL_STEPS = 100
RECORD = "training.json"


@dataclass(frozen=True)
class Work:
    """Where a training keeps its files."""

    out: Path
    threads: int
    vae_steps: int
    decoder_steps: int
    dit_steps: int
    num_clips: int

    @property
    def vae_file(self) -> Path:
        return self.out / "vae.pt"

    @property
    def decoder_file(self) -> Path:
        return self.out / "decoder.pt"

    @property
    def dit_file(self) -> Path:
        return self.out / "dit.pt"

    @property
    def bank(self) -> Path:
        return self.out / "latents"


def main(argv: list[str] | None = None) -> int:
    """Run the stages asked for."""
    options = parse_options(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("out", "threads", "vae_steps", "decoder_steps", "dit_steps", "num_clips")
    work = Work(**{name: getattr(options, name) for name in names})
    stages = STAGES[:-1] if options.stage == "all" else (options.stage,)
    for stage in stages:
        logger.info("stage %s", stage)
        if stage == "vae":
            train_vae(work)
        elif stage == "decoder":
            train_decoder(work)
        elif stage == "latents":
            encode_latents(work)
        elif stage == "dit":
            train_dit(work)
        elif stage == "tokenizer":
            build_tokenizer().save_pretrained(options.out / "tokenizer")
        else:
            export(work, options.export_to or SHIPPED, note=options.note)
    return 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["skyreels_v2"], required=True)
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the training's own files"
    )
    parser.add_argument(
        "--export-to", type=Path, help="checkpoint folder to write (default: the shipped one)"
    )
    for name, default, what in (
        ("vae", 850, "steps of the VAE"),
        ("decoder", 1650, "further steps of its decoder alone"),
        ("dit", 3000, "steps of the transformer"),
    ):
        parser.add_argument(
            f"--{name}-steps", type=_positive, default=default, help=f"{what} (default {default})"
        )
    parser.add_argument(
        "--num-clips", type=_positive, default=1350, help="clips the transformer sees (1350)"
    )
    parser.add_argument("--note", default="", help="a remark that training.json keeps")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default 1)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def train_vae(work: Work) -> AutoencoderKLWan:
    """Train the VAE, or load it if that is done; returns it with averaged weights."""
    torch.manual_seed(0)
    vae = new_vae()
    seen, _ = split_attributes()
    plan = TrainPlan(num_steps=work.vae_steps)
    trainer = Trainer(vae, vae_optimizers(vae), plan=plan, checkpoint=work.vae_file)
    trainer.run(vae_loss(vae, seen, scene_share=VAE_SCENES))
    return vae.eval().requires_grad_(False)


def train_decoder(work: Work) -> AutoencoderKLWan:
    """Train only the VAE's decoder on, or load it if that is done; returns the whole VAE.

    The latents stay what they are, so this can go on while the transformer learns from them.
    """
    vae = train_vae(work)
    seen, _ = split_attributes()
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    decoder.requires_grad_(True)
    plan = TrainPlan(num_steps=work.decoder_steps, decay_share=0.6, seed=1)
    optimizers = vae_optimizers(vae, rate=DECODER_RATE)
    trainer = Trainer(decoder, optimizers, plan=plan, checkpoint=work.decoder_file)
    trainer.run(vae_loss(vae, seen, scene_share=DECODER_SCENES))
    return vae.eval().requires_grad_(False)


def encode_latents(work: Work) -> None:
    """Encode the bank of clips, and measure the latents of its first shards."""
    vae = train_vae(work)
    seen, _ = split_attributes()

    def encode_clips(clips: np.ndarray) -> Tensor:
        with torch.inference_mode():
            video_B3THW = torch.stack([to_signed(frames) for frames in clips])
            return encode(vae, video_B3THW)

    statistics = work.out / "statistics.json"
    for num_clips in (STATISTICS_CLIPS, work.num_clips):
        encode_shards(
            encode_clips, seen, num_clips=num_clips, num_frames=CLIP_FRAMES, folder=work.bank
        )
        if not statistics.exists():
            raw = load_bank(work.bank, mean=[0.0] * 16, std=[1.0] * 16)
            mean, std = measure_channels(raw.latents[:STATISTICS_CLIPS])
            statistics.write_text(json.dumps({"latents_mean": mean, "latents_std": std}))


class DemoModels(nn.Module):
    """The transformer and the text encoder, which are trained together.

    Untrained, the transformer is silent: its gates, its cross-attention and its head are zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiT(DIT)
        self.text = new_text_encoder(vocabulary_size=len(build_tokenizer()))
        silent = [self.dit.time_projection[1], self.dit.fps_projection[2], self.dit.head.head]
        for block in self.dit.blocks:
            assert isinstance(block, Block)
            block.modulation.data.zero_()
            silent.append(block.cross_attn.o)
        for param in [param for layer in silent for param in layer.parameters()]:
            param.data.zero_()


def new_models() -> DemoModels:
    """Make the untrained models, the same every time."""
    torch.manual_seed(0)
    return DemoModels()


def train_dit(work: Work) -> DemoModels:
    """Train transformer and text encoder, or load them if that is done; averaged weights."""
    models = new_models()
    bank = load_bank(work.bank, **_bank_statistics(work))
    logger.info("%d clips", len(bank.captions))
    matrices, rest = split_parameters(models.dit.named_parameters(), matrices_under=("blocks.",))
    optimizers = [
        Muon(matrices, 0.02),
        torch.optim.AdamW(
            [{"params": rest, "lr": 3e-3}, {"params": models.text.parameters(), "lr": 1e-3}],
            betas=(0.9, 0.95),
            weight_decay=0,
        ),
    ]
    plan = TrainPlan(num_steps=work.dit_steps, warmup_steps=100, decay_share=0.45)
    trainer = Trainer(models, optimizers, plan=plan, checkpoint=work.dit_file)
    trainer.run(_DitLoss(models, bank))
    return models.eval().requires_grad_(False)


class _DitLoss:
    """The loss of a training step of the transformer."""

    def __init__(self, models: DemoModels, bank: LatentBank) -> None:
        self.models, self.bank = models, bank
        self.tokenizer = build_tokenizer()

    def __call__(self, _step: int, randomness: StepRandomness) -> Tensor:
        rng = randomness.numpy
        window = draw_window(rng, FORCING)
        size = min(FORCING.largest_batch, FORCING.batch_frames // window.num_frames)
        latents_BCFhw, captions = self.bank.batch(rng, size)
        is_dropped = rng.random(size) < CAPTION_DROP
        captions = ["" if drop else text for text, drop in zip(captions, is_dropped, strict=True)]
        text_BLD = encode_captions(self.models.text, self.tokenizer, captions)

        def velocity(x: Tensor, t_BF: Tensor, bounds: tuple[tuple[int, int], ...] | None) -> Tensor:
            return self.models.dit(x, t_BF, text_BLD, causal_chunks=bounds)

        return forcing_loss(
            velocity,
            latents_BCFhw[:, :, : window.num_frames],
            window,
            plan=FORCING,
            randomness=randomness,
        )


def _bank_statistics(work: Work) -> dict[str, list[float]]:
    measured = json.loads((work.out / "statistics.json").read_text())
    return {"mean": measured["latents_mean"], "std": measured["latents_std"]}


def export(work: Work, folder: Path, *, note: str) -> None:
    """Write the checkpoint folder from the trained parts, and the record of the training."""
    vae, models = train_decoder(work), train_dit(work)
    _, unseen = split_attributes()
    psnr = vae_psnr(vae, unseen, num_clips=VAE_TEST_CLIPS, num_frames=CLIP_FRAMES)
    logger.info("VAE: %.2f dB PSNR on %d unseen clips", psnr, VAE_TEST_CLIPS)
    num_parameters = {
        "vae": _count(vae),
        "transformer": _count(models.dit),
        "text_encoder": _count(models.text),
    }
    write_checkpoint(vae, models, statistics=_bank_statistics(work), folder=folder)
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD and "presets" not in path.parts
    }
    record = {
        "command": f"python scripts/train_demo.py --model skyreels_v2 --out {work.out.name}"
        f" --vae-steps {work.vae_steps} --decoder-steps {work.decoder_steps}"
        f" --dit-steps {work.dit_steps}"
        f" --num-clips {work.num_clips} --threads {work.threads}",
        "num_parameters": num_parameters,
        "vae": _training_record(work.vae_file),
        "decoder": _training_record(work.decoder_file),
        "vae_psnr_db_on_unseen_clips": round(psnr, 2),
        "transformer": _training_record(work.dit_file),
        "mixture": asdict(FORCING),
        "note": note,
        "sha256": files,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    logger.info("wrote %s", folder)


def write_checkpoint(
    vae: AutoencoderKLWan,
    models: DemoModels,
    *,
    statistics: dict[str, list[float]],
    folder: Path,
) -> None:
    """Write all parts in float16 in the `*-Diffusers` layout; a reader never sees half a file.

    The transformer is saved by diffusers' own class, so the layout is the official one.
    """
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    vae.register_to_config(latents_mean=statistics["mean"], latents_std=statistics["std"])
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000
    )
    parts = {
        "vae": vae.half(),
        "transformer": as_diffusers(models.dit).half(),
        "text_encoder": models.text.half(),
        "tokenizer": build_tokenizer(),
        "scheduler": scheduler,
    }
    for name, part in parts.items():
        part.save_pretrained(temporary / name)
    index = {
        "_class_name": "SkyReelsV2DiffusionForcingPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "SkyReelsV2Transformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in [path for path in temporary.rglob("*") if path.is_file()]:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(temporary)


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


def _training_record(checkpoint: Path) -> dict[str, float]:
    saved = torch.load(checkpoint, weights_only=True)
    last = saved["losses"][-_FINAL_STEPS:]
    return {
        "steps": saved["step"],
        "seconds": round(saved["seconds"]),
        "final_loss": round(sum(last) / len(last), 4),
    }


def _count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


if __name__ == "__main__":
    sys.exit(main())
