"""Finding and checking checkpoints in both published layouts."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from huggingface_hub import constants
from refusals import refuses
from safetensors.torch import load_file, save_file
from tiny_skyreels_v2 import diffusers_json
from transformers import UMT5Config, UMT5EncoderModel

from flowcache.runtime.hub import Hub, Missing
from flowcache.runtime.model import load_model
from flowcache.wan import text, vae
from flowcache.wan.checkpoint import diffusers_key, read_diffusers, read_original
from flowcache.wan.dit import DiT, DiTConfig
from flowcache.wan.folder import Folders
from skyreels_v2.model import FOLDERS, released_sizes

find = FOLDERS.find
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
Copy = Callable[..., Path]
"""`copy(layout, is_i2v=False) -> folder`"""


def original_json(config: DiTConfig) -> dict[str, Any]:
    """Return what `config.json` of the original layout holds for a model."""
    names = ("model_type", "in_dim", "out_dim", "dim", "ffn_dim", "freq_dim", "text_len", "eps")
    names = (*names, "num_heads", "num_layers", "inject_sample_info", "text_dim")
    return {"_class_name": "WanModel"} | {name: getattr(config, name) for name in names}


def clip_weights() -> dict[str, torch.Tensor]:
    """Return a CLIP file of the released width with one narrow block and two positions."""
    shapes = {
        "patch_embedding.weight": (1280, 3, 14, 14),
        "cls_embedding": (1, 1, 1280),
        "pos_embedding": (1, 2, 1280),
        "head": (1280, 1024),
        "transformer.0.attn.to_qkv.weight": (3840, 1280),
        "transformer.0.attn.to_qkv.bias": (3840,),
        "transformer.0.attn.proj.weight": (1280, 1280),
        "transformer.0.mlp.0.weight": (8, 1280),
        "transformer.0.mlp.0.bias": (8,),
        "transformer.0.mlp.2.weight": (1280, 8),
    }
    norms = ("pre_norm", "post_norm", "transformer.0.norm1", "transformer.0.norm2")
    shapes |= {f"{norm}.{leaf}": (1280,) for norm in norms for leaf in ("weight", "bias")}
    shapes |= {f"transformer.0.{name}.bias": (1280,) for name in ("mlp.2", "attn.proj")}
    weights = {f"visual.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    return weights | {"textual.token_embedding.weight": torch.zeros(2, 2)}


def write_original(folder: Path, source: Path, *, is_i2v: bool) -> None:
    """Write a checkpoint of the `*-Diffusers` layout in the original one, in two shards."""
    found = find(source)
    folder.mkdir()
    config, dit = found.config, found.dit.load(dtype=None, device="cpu")
    if is_i2v:
        config = replace(config, image_dim=1280)
        dit = DiT(config)
        torch.save(clip_weights(), folder / CLIP_FILE)
    (folder / "config.json").write_text(json.dumps(original_json(config)))
    state = dit.state_dict()
    for number in (0, 1):
        path = folder / f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in list(state)[number::2]}, path)
    codec = vae.load(found.vae, device="cpu").model
    blocks = codec.config.num_res_blocks
    weights = codec.state_dict().items()
    renamed = {vae.original_key(name, num_res_blocks=blocks): value for name, value in weights}
    torch.save(renamed, folder / "Wan2.1_VAE.pth")
    encoder: Any = UMT5EncoderModel.from_pretrained(found.text_encoder)
    renamed = {text.umt5_key(name): value.data for name, value in encoder.named_parameters()}
    torch.save(renamed, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(found.tokenizer, folder / "google/umt5-xxl")


@pytest.fixture(scope="module")
def sources(
    small: Path, small_i2v: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], Path]:
    folder = tmp_path_factory.mktemp("original")
    made = {("diffusers", False): small, ("diffusers", True): small_i2v}
    for is_i2v, source in ((False, small), (True, small_i2v)):
        made["original", is_i2v] = folder / source.name
        write_original(folder / source.name, source, is_i2v=is_i2v)
    return made


@pytest.fixture
def copy(sources: dict[tuple[str, bool], Path], tmp_path: Path) -> Copy:
    """Return what copies a whole tiny checkpoint to a folder of this test."""

    def make(layout: str, *, is_i2v: bool = False) -> Path:
        # the name of the folder says nothing
        folder = tmp_path / "SkyReels-V2-I2V-14B-720P-Diffusers"
        return Path(shutil.copytree(sources[layout, is_i2v], folder))

    return make


@pytest.mark.parametrize(
    ("name", "num_keys", "num_values"),
    [
        ("df-1.3b-540p", 830, 1_435_525_696),
        ("df-14b-540p", 1095, 14_288_491_584),
        ("t2v-14b-720p", 1095, 14_288_491_584),
        ("i2v-1.3b-540p", 983, 1_564_428_608),
        ("i2v-14b-720p", 1303, 16_394_878_784),
    ],
)
def test_every_released_model_is_built_from_either_config(
    tmp_path: Path, name: str, num_keys: int, num_values: int
):
    released = released_sizes(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(original_json(released)))
    assert read_original(path) == released
    path.write_text(json.dumps(diffusers_json(released)))
    assert read_diffusers(path, text_len=512) == released
    with torch.device("meta"):
        state = DiT(released).state_dict()
        theirs = SkyReelsV2Transformer3DModel.from_config(diffusers_json(released))
    assert len(state) == num_keys
    assert sum(value.numel() for value in state.values()) == num_values
    renamed = {diffusers_key(name): value.shape for name, value in state.items()}
    assert renamed == {name: value.shape for name, value in theirs.state_dict().items()}


def test_missing_settings_have_the_defaults_of_the_model_classes(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    sizes: dict[str, Any] = {"in_dim": 16, "out_dim": 16, "dim": 2048, "ffn_dim": 8192}
    sizes |= {"freq_dim": 256, "num_heads": 16, "num_layers": 32, "text_dim": 4096, "text_len": 512}
    defaults = DiTConfig("t2v", **sizes, image_dim=None, inject_sample_info=False, eps=1e-6)
    assert read_original(path) == defaults
    assert read_diffusers(path, text_len=512) == defaults


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_both_layouts_hold_the_same_transformer_and_pass_the_check(
    copy: Copy, small: Path, layout: str
):
    found, source = find(copy(layout)), find(small)
    assert (found.dit.layout, found.config, found.image_encoder) == (layout, source.config, None)
    loaded, expected = (
        each.dit.load(dtype=None, device="cpu").state_dict() for each in (found, source)
    )
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    found.check()


@pytest.mark.parametrize(
    ("layout", "image_encoder"), [("original", CLIP_FILE), ("diffusers", "image_encoder")]
)
def test_an_i2v_checkpoint_is_checked_with_its_image_encoder(
    copy: Copy, tmp_path: Path, layout: str, image_encoder: str
):
    folder = copy(layout, is_i2v=True)
    found = find(folder)
    assert found.image_encoder == folder / image_encoder
    found.check()
    assert found.dit.load(dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    (folder / image_encoder).rename(tmp_path / "elsewhere")
    refuses(lambda: find(folder), str(folder / image_encoder))


@pytest.mark.parametrize(("limit", "text_len"), [(77, 77), (512, 512), (10**30, 512), (1e30, 512)])
def test_prompt_length_is_the_tokenizers_and_at_most_512(copy: Copy, limit: float, text_len: int):
    folder = copy("diffusers")
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))
    assert find(folder).config.text_len == text_len


def test_neither_a_folder_nor_a_hub_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name in ("none", "./org/name", "org/name/more", "", str(tmp_path / "none")):
        if name:
            refuses(lambda name=name: find(name), f"{name}: no such folder", "hub id")
    refuses(lambda: find("org/name"), "org/name: no local copy", "hub")
    (tmp_path / "file").touch()
    refuses(lambda: find(tmp_path / "file"), "is a file")
    refuses(lambda: find(tmp_path), str(tmp_path), "no SkyReels-V2 checkpoint")


def test_a_base_model_needs_no_weights_of_its_transformer_and_fetches_none(copy: Copy):
    folder, asked = copy("original"), list[Any]()
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    base = replace(FOLDERS, has_dit=False, real="org/base", files=("config.json", "Wan2.1_VAE.pth"))
    assert base.is_whole(folder)
    assert not FOLDERS.is_whole(folder)
    assert base.find(folder).dit.files == ()

    def snapshot(_: str, *, allow_patterns: Any, **__: Any) -> str:
        asked.append(allow_patterns)
        return str(folder)

    for place in ("org/base", "org/other"):
        assert base.find(place, hub=Hub(snapshot=snapshot)).folder == folder
    assert asked == [["config.json", "Wan2.1_VAE.pth"], None]


@pytest.mark.parametrize("name", ["skyreels_v2", "self_forcing"])
def test_a_dry_run_says_that_the_sizes_of_a_model_are_not_known(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = load_model(name)
    lacking = Missing("org/name", num_files=3, num_bytes=10**9, cache=tmp_path)
    monkeypatch.setattr(Folders, "find_download", lambda *_: lacking)
    source = model.find("org/name")
    assert source.sizes is None
    refuses(lambda: model.missing(None, source), "org/name, 3 files", "its sizes are not known")


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        ("original", "Wan2.1_VAE.pth"),
        ("original", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("original", "google/umt5-xxl"),
        ("original", "model-00002-of-00002.safetensors"),
        ("diffusers", "vae"),
        ("diffusers", "text_encoder"),
        ("diffusers", "tokenizer"),
    ],
)
def test_a_missing_part_is_named(copy: Copy, tmp_path: Path, layout: str, part: str):
    folder = copy(layout)
    (folder / part).rename(tmp_path / "elsewhere")
    refuses(lambda: find(folder), str(folder / part))


@pytest.mark.parametrize(
    ("layout", "change", "part"),
    [
        ("original", {"num_layers": 0}, "num_layers is 0, expected an integer >= 1"),
        ("original", {"dim": "wide"}, "dim is 'wide', expected an integer >= 1"),
        ("original", {"model_type": "x2v"}, "model_type is 'x2v', expected t2v or i2v"),
        ("original", {"num_heads": 5}, "5 heads do not divide the width 48"),
        ("original", {"qk_norm": False}, "qk_norm is False, only True is supported"),
        ("original", {"eps": None}, "eps is None"),
        ("diffusers", {"num_attention_heads": None}, "num_heads is None"),
        ("diffusers", {"attention_head_dim": "x"}, "attention_head_dim is 'x'"),
        ("diffusers", {"patch_size": [1, 1, 1]}, "patch_size is [1, 1, 1], only [1, 2, 2]"),
        ("diffusers", {"pos_embed_seq_len": 514}, "pos_embed_seq_len is 514, only None"),
        ("diffusers", {"image_dim": "x"}, "image_dim is 'x'"),
        ("diffusers", {"inject_sample_info": 3}, "inject_sample_info is 3"),
        ("original", {"num_layers": 10**9}, "num_layers is 1e+09, expected at most 1000"),
        ("diffusers", {"ffn_dim": 10**30}, "ffn_dim is 1e+30, expected at most 1000000"),
        (
            "diffusers",
            {"num_attention_heads": 10**6, "attention_head_dim": 10**6},
            "the heads make a width of 1000000000000, at most 1000000 expected",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(
    copy: Copy, layout: str, change: dict[str, Any], part: str
):
    folder = copy(layout)
    path = folder / ("config.json" if layout == "original" else "transformer/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | change))
    refuses(lambda: find(folder), str(path), part)
    for content in ("{", "[]"):
        path.write_text(content)
        refuses(lambda: find(folder), str(path))


def test_weights_of_another_model_name_file_and_key(copy: Copy):
    folder = copy("diffusers")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    good = load_file(path)
    key = "blocks.0.attn1.to_q.weight"
    for weights, part in (
        (good | {key: torch.ones(3, 3)}, f"key {key} has shape [3, 3], expected [48, 48]"),
        ({k: v for k, v in good.items() if k != key}, f"key {key} is missing"),
        (good | {"extra.weight": torch.ones(2, 32)}, "key extra.weight is unexpected"),
    ):
        save_file(weights, path)
        refuses(lambda: find(folder).check(), str(path), part)
        refuses(lambda: find(folder).dit.load(dtype=None, device="cpu"), str(path), part)
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-1])
    refuses(lambda: find(folder).check(), str(path), "cut short or corrupt")


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_the_check_reads_every_part(copy: Copy, part: str):
    folder = copy("diffusers")
    path = folder / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuses(lambda: find(folder).check(), str(path), "cut short or corrupt")


def test_a_text_encoder_of_another_width_is_refused(copy: Copy):
    folder = copy("diffusers")
    path = folder / "text_encoder"
    config = UMT5Config(vocab_size=20, d_model=96, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(path)
    refuses(lambda: find(folder).check(), f"{path}: width is 96, the transformer takes 64")
