"""T5 from a folder: what it returns, and files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from flowcache.errors import UserError
from magi1.text import check_encoder, load

pytestmark = pytest.mark.numeric

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "sits", "on", "grass"]
CONFIG = T5Config(
    vocab_size=16,
    d_model=12,
    d_kv=4,
    d_ff=16,
    num_layers=2,
    num_heads=3,
    feed_forward_proj="gated-gelu",
)


def tiny_model() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(CONFIG).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An encoder in the layout of transformers, with a tokenizer of eight words."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def as_released(folder: Path) -> Path:
    """Store the weights as the release does: two pickled shards and an index."""
    (folder / "model.safetensors").unlink()
    state = tiny_model().state_dict()
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    weight_map = {key: names[place % 2] for place, key in enumerate(state)}
    for name in names:
        torch.save({k: state[k].clone() for k in state if weight_map[k] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_prompt_is_encoded_to_its_own_tokens(folder: Path):
    check_encoder(folder, width=12)
    encoder = load(folder, max_length=800, device="cpu")
    text = encoder.encode("  A CAT   sits on grass ")
    ids = torch.tensor([[3, 4, 5, 6, 7, 1]])
    with torch.no_grad():
        want = tiny_model()(input_ids=ids).last_hidden_state[0]
    assert_close(text, want, ulps=256)
    assert encoder.count_tokens("a cat") == 3


def test_padding_changes_nothing(folder: Path):
    text = load(folder, max_length=800, device="cpu").encode("a cat")
    ids, mask = torch.tensor([[3, 4, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        padded = tiny_model()(input_ids=ids, attention_mask=mask).last_hidden_state[0]
    assert_close(text, padded[:3], ulps=256)


def test_a_long_prompt_is_cut_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture):
    encoder = load(folder, max_length=4, device="cpu")
    assert encoder.encode("a cat sits on grass").shape == (4, 12)
    assert "2 tokens too long" in caplog.text


def test_the_released_shards_are_loaded(folder: Path):
    want = load(folder, max_length=8, device="cpu").encode("a cat")
    as_released(folder)
    check_encoder(folder, width=12)
    assert torch.equal(load(folder, max_length=8, device="cpu").encode("a cat"), want)


def test_a_missing_shard_is_named(folder: Path):
    as_released(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002\.bin: no such file"):
        check_encoder(folder, width=12)


def test_an_encoder_of_another_width_is_refused(folder: Path):
    with pytest.raises(UserError, match="width is 12, the transformer takes 4096"):
        check_encoder(folder, width=4096)


def test_a_folder_without_tokenizer_is_refused(folder: Path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        check_encoder(folder, width=12)
