"""How the demo checkpoint is trained: two causal transformers, with the parts of another demo.

VAE, tokenizer and text encoder are those of the demo in `BASE`, whose transformer is where the
training starts. Stages: `latents` (encodes the clips that are learned from), `dit` (the teacher, a
model of many steps), `distill` (the student of few steps). `scripts/train_demo.py` runs them.
"""

import copy
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from flowcache.demo.causal_wan import CausalPlan, StudentLoss, TeacherLoss
from flowcache.demo.latents import Statistics, encode_bank, read_bank
from flowcache.demo.optim import new_optimizers
from flowcache.demo.recipe import RECORD, Recipe, Training, new_files
from flowcache.demo.trainer import Loss, Trainer, TrainPlan
from flowcache.demo.wan_vae import original_weights
from flowcache.errors import UserError
from flowcache.runtime.config import read_yaml
from flowcache.runtime.files import read_json, write_json, write_text
from flowcache.wan import text, vae
from flowcache.wan.dit import DiT
from flowcache.wan.folder import PARTS, WanFolder
from self_forcing.checkpoint import FOLDERS
from self_forcing.released import DEMO, PRESETS

BASE = Path(__file__).resolve().parents[2] / "FlowCache4SkyReels-V2" / "demo"
PLAN = CausalPlan()
CLIP_FRAMES = 97
SIDE = 64
"""Pixels of a clip, in both directions."""
MANY_STEPS = 30
"""Of the teacher, for a chunk."""
STUDENT, TEACHER = "checkpoints/self_forcing_dmd.pt", "checkpoints/ar_diffusion.pt"
"""In the exported folder, named as the released weights are."""


def find_base() -> WanFolder:
    """Find the demo whose parts are taken."""
    return replace(FOLDERS, has_dit=True).find_in(BASE)


def new_dit() -> DiT:
    """Return the transformer that training starts from.

    It computes what the base's does at 24 frames per second: the frame rate, which a Self-Forcing
    model is not told, becomes part of a bias.
    """
    base = find_base().dit.load(dtype=torch.float32, device="cpu")
    dit, weights = DiT(replace(base.config, inject_sample_info=False)), base.state_dict()
    with torch.no_grad():
        rate = base.fps_projection(base.fps_embedding(torch.tensor([1])))[0]
    weights["time_projection.1.bias"] = weights["time_projection.1.bias"] + rate
    dit.load_state_dict({key: weights[key] for key in dit.state_dict()})
    return dit.requires_grad_(True)


def load_encoder() -> text.TextEncoder:
    """Load the base's text encoder."""
    return find_base().load_text(dtype=torch.float32, device="cpu")


def base_hashes(training: Training) -> dict[str, str]:
    """Return the hashes of the base's files; a training can't go on with another base.

    Raises:
        UserError: the training was begun with one.
    """
    kept, hashes = training.out / "base.json", read_json(BASE / RECORD)["sha256"]
    if not kept.exists():
        write_json(kept, hashes)
    if read_json(kept) != hashes:
        raise UserError(
            f"{training.out}: this training was begun with another demo than {BASE} now holds: "
            "choose another --out"
        )
    return hashes


def encode_latents(training: Training) -> None:
    """Encode the clips that the transformers learn from."""
    base_hashes(training)
    encode_bank(
        vae.load(find_base().vae, device="cpu").encode,
        num_clips=training.num_clips,
        num_frames=CLIP_FRAMES,
        folder=training.out,
        known=Statistics(mean=[0.0] * 16, std=[1.0] * 16),  # the base's VAE normalises
    )


def begun(training: Training, path: str, name: str, *, otherwise: DiT) -> DiT:
    """Return a transformer to train: of the folder that the training begins with, if there is one.

    Args:
        path: of its weights in an exported folder.
        name: of their entry.
    """
    if training.start is not None:
        saved = torch.load(training.start / path, weights_only=True)[name]
        otherwise.load_state_dict({key.removeprefix("model."): x for key, x in saved.items()})
    return otherwise.requires_grad_(True)


def train_teacher(training: Training) -> DiT:
    """Train the model of many steps, or load it if that is done."""
    base_hashes(training)
    dit = begun(training, TEACHER, "generator", otherwise=new_dit())
    loss = TeacherLoss(dit, read_bank(training.out), load_encoder().encode, plan=PLAN)
    return _train(dit, training, "dit", loss=loss, matrix_rate=0.01)


def distill(training: Training) -> DiT:
    """Train the model of few steps, or load it if that is done."""
    teacher = train_teacher(training)
    student = begun(training, STUDENT, "generator_ema", otherwise=copy.deepcopy(teacher))
    bank, encode = read_bank(training.out), load_encoder().encode
    loss = StudentLoss(student, teacher, bank, encode, plan=PLAN)
    return _train(student, training, "distill", loss=loss, matrix_rate=0.006)


def _train(dit: DiT, training: Training, stage: str, *, loss: Loss, matrix_rate: float) -> DiT:
    optimizers = new_optimizers(
        dit.named_parameters(),
        matrices_under=("blocks.",),
        matrix_rate=matrix_rate,
        rate=0.15 * matrix_rate,
    )
    plan = TrainPlan(
        num_steps=training.steps[stage],
        warmup_steps=30,
        decay_share=0.6,
        rate=training.rate("transformer"),
    )
    Trainer(dit, optimizers, plan=plan, checkpoint=training.checkpoint(stage)).run(loss)
    return dit.eval().requires_grad_(False)


def export(training: Training, folder: Path) -> dict[str, Any]:
    """Write the checkpoint folder from the trained parts; return what the record says of them."""
    student, teacher = distill(training), train_teacher(training)
    write_checkpoint(student, teacher, folder)
    write_presets(folder)
    return {
        "base": {"folder": f"{BASE.parent.name}/{BASE.name}", "sha256": base_hashes(training)},
        "num_parameters": {"transformer": sum(param.numel() for param in teacher.parameters())},
        "teacher": training.record("dit"),
        "student": training.record("distill"),
        "plan": asdict(PLAN),
    }


def write_checkpoint(student: DiT, teacher: DiT, folder: Path) -> None:
    """Write all parts in float16 in the original layout; a reader never sees half a file."""
    base, names = find_base(), PARTS["original"]
    sizes = asdict(teacher.config)
    del sizes["image_dim"]
    encoder = load_encoder().model.state_dict()
    with new_files(folder) as made:
        config = {"_class_name": "WanModel", **sizes}
        (made / names["config"]).write_text(json.dumps(config, indent=2) + "\n")
        _save(original_weights(vae.load(base.vae, device="cpu").model), made / names["vae"])
        _save({text.umt5_key(key): x for key, x in encoder.items()}, made / names["text_encoder"])
        shutil.copytree(base.tokenizer, made / names["tokenizer"])
        for path, copy_name, dit in (
            (STUDENT, "generator_ema", student),
            (TEACHER, "generator", teacher),
        ):
            (made / path).parent.mkdir(exist_ok=True)
            _save(
                {f"model.{key}": x for key, x in dit.state_dict().items()}, made / path, copy_name
            )


def write_presets(folder: Path) -> None:
    """Write what the demo wants otherwise than the released models, where nothing is written yet.

    A preset of many steps takes the teacher, one of few steps the student.
    """
    own: dict[str, dict[str, Any]] = {
        "base": {"height": SIDE, "width": SIDE, "checkpoint": STUDENT, "reuse": {"rescale": "none"}}
    }
    many = {"checkpoint": TEACHER, "num_steps": MANY_STEPS, "guidance": PLAN.guidance}
    for path in sorted(PRESETS.glob("*.yaml")):
        if path.stem in own:
            continue
        has_many = read_yaml(path).get("step_list", ()) is None
        own[path.stem] = many if has_many else {"checkpoint": STUDENT}
    (folder / "presets").mkdir(exist_ok=True)
    for name, values in own.items():
        path = folder / "presets" / f"{name}.yaml"
        if not path.exists():
            write_text(path, yaml.safe_dump(values, sort_keys=False))


def _save(weights: dict[str, Tensor], path: Path, within: str | None = None) -> None:
    halved = {key: value.half().contiguous() for key, value in weights.items()}
    torch.save(halved if within is None else {within: halved}, path)


RECIPE = Recipe(
    shipped=DEMO,
    default_steps={"dit": 3000, "distill": 1500},
    stages={"latents": encode_latents, "dit": train_teacher, "distill": distill},
    export=export,
)
