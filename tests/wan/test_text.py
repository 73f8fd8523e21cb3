import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from refusals import refuses
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from flowcache.wan import text
from flowcache.wan.text import TextEncoder, VisionEncoder, clean_prompt, clip_origin, umt5_key

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels_v2"
NUM_HEADS = 4
"""Heads of the reference's CLIP tower, which its weights do not show."""
TEXT_LEN = 8


def _weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "weights."
    return {key[len(prefix) :]: golden[key] for key in golden if key.startswith(prefix)}


@pytest.fixture(scope="module")
def umt5() -> dict[str, Tensor]:
    return load_file(GOLDEN / "umt5.safetensors")


@pytest.fixture(scope="module")
def clip() -> dict[str, Tensor]:
    return load_file(GOLDEN / "clip_vision.safetensors")


@pytest.fixture(scope="module")
def umt5_path(umt5: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("umt5") / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(_weights(umt5), path)
    return path


@pytest.fixture(scope="module")
def clip_path(clip: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "models_clip.pth"
    text_side = {"textual.head.weight": torch.ones(2, 2), "log_scale": torch.ones([])}
    torch.save(_weights(clip) | text_side, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of ten words that ends every prompt with an end token, as UMT5's does."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "moving", "café", "on", "猫"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(umt5_path: Path, tokenizer: Path) -> TextEncoder:
    return text.load_encoder(
        umt5_path, tokenizer=tokenizer, text_len=TEXT_LEN, dtype=None, device="cpu"
    )


@pytest.fixture(scope="module")
def vision(clip_path: Path) -> VisionEncoder:
    return text.load_vision(clip_path, num_heads=NUM_HEADS, dtype=None, device="cpu")


def test_umt5_equals_the_reference(umt5: dict[str, Tensor], encoder: TextEncoder):
    out = text.encode_tokens(encoder.model, umt5["in.ids"], mask_BL=umt5["in.mask"])
    assert_close(out, umt5["out.masked"], ulps=256)
    assert torch.all(out[umt5["in.mask"] == 0] == 0)


def test_clip_and_its_preprocessing_equal_the_reference(
    clip: dict[str, Tensor], vision: VisionEncoder
):
    image = clip["in.video"][:, :, 0]
    assert_close(vision.prepare(image), clip["out.pixels"], ulps=256)
    assert_close(vision.encode(image), clip["out.features"], ulps=256)


def test_the_config_of_an_original_file_follows_from_its_shapes(
    encoder: TextEncoder, vision: VisionEncoder
):
    sizes = {"vocab_size": 100, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48}
    sizes |= {"num_layers": 3, "relative_attention_num_buckets": 32}
    assert encoder.model.config.to_dict().items() >= sizes.items()
    sizes = {"image_size": 28, "patch_size": 14, "hidden_size": 32, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 3, "projection_dim": 16, "hidden_act": "gelu"}
    assert vision.model.config.to_dict().items() >= sizes.items()


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a red\n\n\tcircle  ", "a red circle"),
        ("a &lt;cat&gt;", "a <cat>"),
        ("a &amp;lt;cat&amp;gt;", "a <cat>"),
        ("<b> tom &amp;amp; jerry", "<b> tom & jerry"),
        ("a&nbsp;&nbsp;cat ", "a cat"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("一只猫在钢琴上", "一只猫在钢琴上"),
        ("🐈 на ковре", "🐈 на ковре"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_prompts_are_cleaned(prompt: str, cleaned: str):
    assert clean_prompt(prompt) == cleaned


@pytest.mark.parametrize(("prompt", "num_tokens"), [("a red  circle", 4), ("a 猫", 3), ("", 1)])
def test_a_prompt_is_padded_with_zero_rows_after_its_end_token(
    encoder: TextEncoder, prompt: str, num_tokens: int
):
    out = encoder.encode([prompt, "a"])
    assert out.shape == (2, TEXT_LEN, 32)
    assert encoder.count_tokens(prompt) == num_tokens
    assert torch.all(out[0, :num_tokens].abs().amax(dim=1) > 0)
    assert torch.all(out[0, num_tokens:] == 0)


def test_padding_does_not_change_the_words(encoder: TextEncoder, tokenizer: Path, umt5_path: Path):
    wide = text.load_encoder(umt5_path, tokenizer=tokenizer, text_len=20, dtype=None, device="cpu")
    padded, plain = (one.encode(["a red circle"])[:, :4] for one in (wide, encoder))
    assert_close(padded, plain, ulps=64)


def test_a_long_prompt_is_cut_and_the_log_says_by_how_much(
    encoder: TextEncoder, caplog: pytest.LogCaptureFixture
):
    fits = encoder.encode(["a " * (TEXT_LEN - 1)])
    assert not caplog.records
    for num_words, num_cut in ((TEXT_LEN, 1), (50_000, 49_993)):
        # the end token is kept: 7 words and the end, as in the prompt that fits
        assert torch.equal(encoder.encode(["a " * num_words]), fits)
        message = caplog.messages.pop()
        assert f"the prompt is {num_cut} tokens too long" in message
        assert len(message) < 200


def test_folders_of_transformers_hold_the_same_encoders(
    encoder: TextEncoder,
    vision: VisionEncoder,
    clip: dict[str, Tensor],
    tokenizer: Path,
    tmp_path: Path,
):
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    vision.model.save_pretrained(tmp_path / "image_encoder")
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    folder = tmp_path / "text_encoder"
    words = text.load_encoder(folder, tokenizer=tokenizer, text_len=TEXT_LEN, **options)
    assert torch.equal(words.encode(["a red 猫"]), encoder.encode(["a red 猫"]))
    image = clip["in.video"][:, :, 0]
    pixels = text.load_vision(tmp_path / "image_encoder", **options)
    assert torch.equal(pixels.encode(image), vision.encode(image))
    text.check_encoder(tmp_path / "text_encoder", tokenizer=tokenizer, width=32)
    text.check_vision(tmp_path / "image_encoder", width=32)


def test_sharded_and_older_folders_are_read(
    encoder: TextEncoder, vision: VisionEncoder, tokenizer: Path, tmp_path: Path
):
    """Old versions of transformers saved a table of positions; big encoders come in shards."""
    encoder.model.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1
    vision.model.save_pretrained(tmp_path / "image_encoder")
    path = tmp_path / "image_encoder" / "model.safetensors"
    table = {"vision_model.embeddings.position_ids": torch.arange(5).unsqueeze(0)}
    save_file(load_file(path) | table, path)
    text.check_encoder(tmp_path / "text_encoder", tokenizer=tokenizer, width=32)
    text.check_vision(tmp_path / "image_encoder", width=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_have_the_asked_dtype(
    umt5_path: Path,
    clip_path: Path,
    clip: dict[str, Tensor],
    tokenizer: Path,
    encoder: TextEncoder,
    dtype: torch.dtype,
):
    words = text.load_encoder(
        umt5_path, tokenizer=tokenizer, text_len=TEXT_LEN, dtype=dtype, device="cpu"
    )
    out = words.encode(["a red circle"])
    assert out.dtype == dtype
    cosine = functional.cosine_similarity(
        out.float().flatten(), encoder.encode(["a red circle"]).flatten(), dim=0
    )
    assert cosine > 0.999
    pixels = text.load_vision(clip_path, num_heads=NUM_HEADS, dtype=dtype, device="cpu")
    assert pixels.encode(clip["in.video"][:, :, 0]).dtype == dtype


def test_released_sizes_map_onto_the_keys_of_the_released_files():
    names = [name for name, _ in text.released_encoder().named_parameters()]
    assert len({umt5_key(name) for name in names}) == len(names) == 2 + 24 * 10
    sizes: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "image_size": 224}
    sizes |= {"num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
    with torch.device("meta"):
        pixels = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=1024))
    shapes = {
        "visual.transformer.31.attn.to_qkv.weight": (3840, 1280),
        "visual.cls_embedding": (1, 1, 1280),
        "visual.pos_embedding": (1, 257, 1280),
        "visual.head": (1280, 1024),
    }
    keys = set()
    for name, parameter in pixels.named_parameters():
        origin = clip_origin(name)
        keys.add(origin.key)
        if origin.key in shapes:
            stored = torch.empty(shapes[origin.key], device="meta")
            assert origin.take(stored).shape == parameter.shape
    # patches, class, positions, two norms, head; per block 2 norms, qkv, projection, 2 linear
    assert len(keys) == 1 + 1 + 1 + 2 * 2 + 1 + 32 * 2 * 6
    assert shapes.keys() <= keys


T5_KEY, CLIP_KEY = "blocks.1.ffn.fc2.weight", "visual.transformer.1.attn.to_qkv.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "width is 32, the transformer takes 64"),
        (None, "key token_embedding.weight is missing"),
        ({T5_KEY: None}, f"key {T5_KEY} is missing"),
        ({T5_KEY: (3, 3)}, f"key {T5_KEY} has shape [3, 3], expected [32, 48]"),
        ({"blocks.0.attn.q.bias": (3,)}, "key blocks.0.attn.q.bias is unexpected"),
    ],
)
def test_a_misfit_of_an_original_text_encoder_names_file_and_key(
    umt5: dict[str, Tensor],
    tokenizer: Path,
    tmp_path: Path,
    change: dict[str, Any] | None,
    words: str,
):
    path = _write_changed(tmp_path / "t5.pth", _weights(umt5), change)
    width = 32 if change else 64
    check = partial(text.check_encoder, path, tokenizer=tokenizer, width=width)
    refuses(check, str(path), words)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"width": 1280}, "width is 32, the transformer takes 1280"),
        ({}, {"num_heads": 5}, "heads (5)"),
        (None, {}, "key visual.patch_embedding.weight is missing"),
        ({CLIP_KEY: None}, {}, f"key {CLIP_KEY} is missing"),
        ({CLIP_KEY: (95,)}, {}, f"{CLIP_KEY} has shape [95], expected [32] for vision_model.enc"),
        ({"visual.cls_embedding": (1,)}, {}, "visual.cls_embedding has shape [1], expected [32]"),
        ({"visual.extra": (1,)}, {}, "key visual.extra is unexpected"),
    ],
)
def test_a_misfit_of_an_original_image_encoder_names_file_and_key(
    clip: dict[str, Tensor],
    tmp_path: Path,
    change: dict[str, Any] | None,
    options: dict[str, Any],
    words: str,
):
    path = _write_changed(tmp_path / "clip.pth", _weights(clip), change)
    check = partial(text.check_vision, path, **{"width": 32, "num_heads": NUM_HEADS} | options)
    refuses(check, str(path), words)


def _write_changed(path: Path, weights: dict[str, Tensor], change: dict[str, Any] | None) -> Path:
    """Write weights with other shapes, or without a key; None: one key of something else."""
    weights = {"x": torch.ones(1)} if change is None else weights
    for key, shape in (change or {}).items():
        weights = {k: value for k, value in weights.items() if k != key}
        if shape is not None:
            weights[key] = torch.ones(shape)
    torch.save(weights, path)
    return path


def test_a_folder_that_is_no_encoder_is_refused(
    encoder: TextEncoder, tokenizer: Path, tmp_path: Path
):
    def check() -> None:
        text.check_encoder(tmp_path, tokenizer=tokenizer, width=32)

    config = tmp_path / "config.json"
    refuses(check, f"{config}: no such file")
    refuses(lambda: text.check_vision(tmp_path, width=32), f"{config}: no such file")
    encoder.model.save_pretrained(tmp_path)
    good = json.loads(config.read_text())
    for content, reason in (
        ("{", "not a readable JSON file"),
        ("[]", "holds a list, expected a JSON object"),
        (json.dumps(good | {"d_model": "wide"}), "not a readable config"),
    ):
        config.write_text(content)
        refuses(check, f"{config}: {reason}")
    config.write_text(json.dumps(good | {"num_layers": 4}))
    refuses(check, str(tmp_path / "model.safetensors"), "key encoder.block.3.", "is missing")
    config.write_text(json.dumps(good | {"d_ff": -1}))
    refuses(check, str(tmp_path))


def test_a_folder_that_is_no_fitting_tokenizer_is_refused(
    umt5_path: Path, tokenizer: Path, tmp_path: Path
):
    def check(folder: Path) -> None:
        text.check_encoder(umt5_path, tokenizer=folder, width=32)

    check(tokenizer)
    for folder in (tmp_path, tmp_path / "none"):
        refuses(lambda folder=folder: check(folder), f"{folder}: holds no tokenizer")
    made = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    made.add_tokens([f"word{i}" for i in range(91)])
    made.save_pretrained(tmp_path / "large")
    refuses(
        lambda: check(tmp_path / "large"),
        f"{tmp_path / 'large'}: the tokenizer has 101 tokens, the text encoder knows 100",
    )
    PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer).save_pretrained(
        tmp_path / "bare"
    )
    refuses(lambda: check(tmp_path / "bare"), "the tokenizer has no padding token")
