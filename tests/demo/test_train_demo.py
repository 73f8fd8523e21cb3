"""The SkyReels-V2 recipe: what it exports is the official layout and computes the same."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from closeness import assert_close
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from flowcache.demo.latents import Statistics
from flowcache.demo.text import TEXT_LEN, TEXT_WIDTH, new_umt5_encoder, start_encoder
from flowcache.demo.wan_vae import new_vae
from skyreels_v2 import demo

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export untrained parts whose silent layers are filled, so that an output can differ."""
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    models = demo.DemoModels.new(None)
    generator = torch.Generator().manual_seed(0)
    for param in models.dit.parameters():
        param.data += 0.05 * torch.randn(param.shape, generator=generator)
    statistics = Statistics(mean=[0.5] * 16, std=[2.0] * 16)
    torch.save(models.dit.half().float().state_dict(), folder.with_suffix(".pt"))
    models.write(new_vae(), statistics=statistics, folder=folder)
    return folder


def test_diffusers_loads_the_transformer_and_computes_the_same(exported: Path):
    theirs, report = SkyReelsV2Transformer3DModel.from_pretrained(
        exported / "transformer", torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    ours = demo.DiT(demo.DIT)
    ours.load_state_dict(torch.load(exported.with_suffix(".pt"), weights_only=True))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 5, 8, 8, generator=generator)
    text = torch.randn(1, TEXT_LEN, TEXT_WIDTH, generator=generator)
    t = torch.tensor([[0, 20, 300, 700, 999]])
    with torch.inference_mode():
        expected = theirs(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=text,
            enable_diffusion_forcing=True,
            fps=torch.tensor([1]),
            return_dict=False,
        )[0]
        velocity = ours(x, t.float(), text)
    assert velocity.std() > 0.1
    assert_close(velocity, expected, ulps=256)


def test_the_other_parts_load_with_their_libraries(exported: Path):
    vae = AutoencoderKLWan.from_pretrained(exported / "vae")
    assert vae.config.latents_mean == [0.5] * 16
    assert vae.config.latents_std == [2.0] * 16
    encoder = UMT5EncoderModel.from_pretrained(exported / "text_encoder")
    assert encoder.config.d_model == TEXT_WIDTH
    tokenizer = AutoTokenizer.from_pretrained(exported / "tokenizer")
    assert len(tokenizer) == encoder.config.vocab_size
    index = json.loads((exported / "model_index.json").read_text())
    assert all((exported / name).is_dir() for name in index if not name.startswith("_"))


def test_a_training_can_begin_with_the_weights_of_a_checkpoint(exported: Path):
    begun = demo.DemoModels.new(exported)
    kept = torch.load(exported.with_suffix(".pt"), weights_only=True)
    assert all(torch.equal(value, kept[key]) for key, value in begun.dit.state_dict().items())
    half = {key: value.half().float() for key, value in new_vae().state_dict().items()}
    assert all(
        torch.equal(value, half[key]) for key, value in new_vae(exported).state_dict().items()
    )


def test_words_that_a_tokenizer_did_not_know_keep_their_untrained_rows(
    exported: Path, tmp_path: Path
):
    file = exported / "tokenizer" / "tokenizer.json"
    tokens = json.loads(file.read_text())
    words = tokens["model"]["vocab"]
    known = [word for word in words if word != "and"]
    tokens["model"]["vocab"] = {word: index for index, word in enumerate(known)}
    older = tmp_path / "tokenizer.json"
    older.write_text(json.dumps(tokens))
    encoder, untrained = new_umt5_encoder(), new_umt5_encoder()
    untrained.load_state_dict(encoder.state_dict())
    start_encoder(encoder, folder=exported / "text_encoder", tokenizer=older)
    rows, before = (each.get_input_embeddings().weight for each in (encoder, untrained))
    trained = UMT5EncoderModel.from_pretrained(exported / "text_encoder", dtype=torch.float32)
    assert torch.equal(rows[words["and"]], before[words["and"]])
    for word in ("red", "</s>"):
        row = trained.get_input_embeddings().weight[known.index(word)]
        assert torch.equal(rows[words[word]], row)
        assert not torch.equal(row, before[words[word]])


@pytest.mark.parametrize(
    "words",
    [
        ["--architecture", "other"],
        ["--architecture", "skyreels_v2", "--out", "x", "--vae-steps", "0"],
        ["--architecture", "skyreels_v2", "--out", "x", "--distill-steps", "5"],
        ["--architecture", "magi1", "--out", "x", "--stage", "scheduler"],
    ],
)
def test_wrong_options_end_with_code_2(load_script: Callable[[str], ModuleType], words: list[str]):
    script = load_script("train_demo")
    with pytest.raises(SystemExit) as ended:
        script.main(words)
    assert ended.value.code == 2
