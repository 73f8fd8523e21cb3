"""Every command on replicas of the releases as they lie on the hub, to a video that plays.

The fast tests run a command or two on one replica per feature of a layout, the slow ones all
commands on all replicas.
"""

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from replicas import (
    MAGI,
    MAGI_SIZES,
    SKYREELS,
    SkyReels,
    magi_state,
    skyreels_shapes,
    wan_vae_shapes,
    write_magi,
    write_skyreels,
    write_spiece,
    write_t5,
    write_t5_config,
    write_tokenizer,
)
from sentencepiece import SentencePieceProcessor

from flowcache.errors import UserError
from flowcache.runtime.embeddings import load_tokenizer
from flowcache.runtime.video import VideoWriter, probe
from magi1 import __main__ as magi1
from magi1 import upstream as magi1_upstream
from magi1.released import CONFIGS
from magi1.released import PRESETS as MAGI_PRESETS
from skyreels_v2 import __main__ as skyreels_v2
from skyreels_v2 import upstream as skyreels_upstream
from skyreels_v2.released import FOLDER as SKYREELS_FOLDER

PROMPT = "a red circle moving right on a black background"


@pytest.fixture(scope="session")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_spiece(tmp_path_factory.mktemp("spiece"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    rows = np.linspace(0, 255, 40, dtype=np.uint8)[:, None, None]
    Image.fromarray(np.broadcast_to(rows, (40, 60, 3)).copy()).save(path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), dtype=np.uint8)
    with VideoWriter(path, fps=24, size=(32, 48)) as writer:
        writer.append(frames)
    return path


def check_one_video(folder: Path) -> None:
    (video,) = folder.rglob("*.mp4")
    assert probe(video).num_frames > 0


# What the builder makes is the releases' ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_layers", "num_keys"),
    [
        ("DF-1.3B-540P", 30, 830),
        ("DF-14B-540P", 40, 1095),
        ("T2V-14B-720P", 40, 1095),
        ("I2V-1.3B-540P", 30, 983),
        ("I2V-14B-720P", 40, 1303),
    ],
)
def test_replicas_of_skyreels_have_the_released_number_of_tensors(
    name: str, num_layers: int, num_keys: int
):
    (model,) = [each for each in SKYREELS if each.name == name]
    assert len(skyreels_shapes(model, num_layers=num_layers)) == num_keys


def test_the_replica_of_the_wan_vae_has_the_released_number_of_values():
    shapes = wan_vae_shapes(96)
    assert (len(shapes), sum(map(prod, shapes.values()))) == (194, 126_892_531)


@pytest.mark.parametrize(
    ("num_layers", "is_fp8", "num_keys"), [(34, False, 898), (34, True, 1410), (48, False, 1262)]
)
def test_replicas_of_magi_have_the_released_number_of_tensors(
    num_layers: int, is_fp8: bool, num_keys: int
):
    tiny = MAGI_SIZES | {"hidden_size": 16, "in_channels": 2, "gated_linear_unit": False}
    assert len(magi_state(tiny | {"num_layers": num_layers}, is_fp8=is_fp8)) == num_keys


# SkyReels-V2 --------------------------------------------------------------------------------------

Handed = Callable[..., list[str]]
"""What a launcher hands on to the package, given its name, settings and variables."""
SHORT = ["num_steps=3", "base_num_frames=17", "overlap_history=null", "causal_block_size=2"]
# the published coefficients are of models of the released widths
SHORT += ["reuse.rescale=none"]
SIZE = {"HEIGHT": "16", "WIDTH": "32", "NUM_FRAMES": "17"}
RUNS = (
    *("vanilla", "flowcache_fast", "flowcache_slow", "flowcache_kvcompress"),
    *("teacache_fast", "teacache_slow"),
)
FORCING = ["--base_num_frames", "17", "--ar_step", "1", "--causal_block_size", "2"]
TEACACHE = ["--teacache", "--use_ret_steps"]
UPSTREAM = "upstream"
"""The released scripts, in place of a launcher's name."""


@pytest.fixture
def skyreels_launchers(copy_launchers: Callable[..., Any]) -> Handed:
    return copy_launchers(
        SKYREELS_FOLDER,
        ["scripts/common.sh", *(f"run_{name}.sh" for name in RUNS)],
        pattern="run_{}.sh",
        package="skyreels_v2",
        variables=(*SIZE, "MODEL", "PROMPT", "IMAGE", "VIDEO", "SEED", "GPUS", "OUT"),
    ).handed_on


def run_upstream_skyreels(folder: Path, model: SkyReels, picture: Path) -> None:
    """Run upstream's script of the model's kind, with its caches."""
    base = ["--model_id", str(folder), "--resolution", model.name[-4:], "--prompt", PROMPT]
    base += ["--num_frames", "17", "--seed", "1"]
    script = "generate_video_df.py" if model.name.startswith("DF") else "generate_video.py"
    if model.name.startswith("DF"):
        flags = [[], TEACACHE, [*TEACACHE, "--flowcache"]]
        flags += [["--flowcache", "--use_compress", "--budget_block", "1"]]
        runs = [[*FORCING, *each] for each in flags]
    else:
        image = ["--image", str(picture)] if model.is_i2v else []
        runs = [image, [*image, *TEACACHE]]
    for place, flags in enumerate(runs):
        given = [*base, *flags, "--outdir", f"{place}", "height=16", "width=32"]
        assert skyreels_upstream.main(script, [*given, SHORT[0], SHORT[-1]]) == 0, flags
        check_one_video(Path("result", f"{place}"))


def some_or_all(some: Sequence[tuple[Any, ...]], every: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return the cases of all tests, and those of the slow ones."""
    return [*some, *(pytest.param(*case, marks=pytest.mark.slow) for case in every)]


@pytest.mark.parametrize(
    ("name", "layout", "commands"),
    some_or_all(
        [
            ("DF-1.3B-540P", "original", ["vanilla"]),  # one file, rates
            ("DF-14B-720P", "original", ["flowcache_fast"]),  # shards with an index, bfloat16
            ("I2V-14B-540P", "original", ["teacache_fast"]),  # CLIP
            ("DF-14B-540P", "diffusers", ["flowcache_kvcompress"]),  # shards everywhere
            ("I2V-1.3B-540P", "diffusers", [UPSTREAM]),  # CLIP
        ],
        [
            (model.name, layout, [*RUNS, UPSTREAM])
            for model in SKYREELS
            for layout in ("original", "diffusers")
        ],
    ),
)
def test_a_replica_of_skyreels_makes_videos(
    name: str,
    layout: str,
    commands: Sequence[str],
    spiece: Path,
    skyreels_launchers: Handed,
    picture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    (model,) = [each for each in SKYREELS if each.name == name]
    folder = write_skyreels(tmp_path / f"SkyReels-V2-{name}", model, spiece, layout=layout)
    for command in commands:
        if command == UPSTREAM:
            run_upstream_skyreels(folder, model, picture)
            continue
        out = tmp_path / command
        variables = {"MODEL": str(folder), "PROMPT": PROMPT, "OUT": str(out)} | SIZE
        variables |= {"IMAGE": str(picture)} if model.is_i2v else {}
        assert skyreels_v2.main(skyreels_launchers(command, *SHORT, **variables)) == 0, command
        check_one_video(out)


# MAGI-1 -------------------------------------------------------------------------------------------

MODES = ("t2v", "i2v", "v2v")


@pytest.fixture
def magi_launchers(copy_launchers: Callable[..., Any]) -> Handed:
    names = ("MODEL", "PRESET", "PROMPT", "IMAGE", "VIDEO", "PREFIX_FRAMES", "HEIGHT", "WIDTH")
    names += ("NUM_FRAMES", "NUM_STEPS", "WINDOW", "THRESHOLD", "TOTAL_CHUNKS", "SEED")
    return copy_launchers(
        MAGI_PRESETS.parent,
        ["scripts", "assets"],
        pattern="scripts/single_run/{}.sh",
        package="magi1",
        variables=(*names, "SPECIAL_TOKENS", "GPUS", "OUT"),
    ).handed_on


@pytest.mark.parametrize(
    ("name", "commands"),
    some_or_all(
        [
            ("4.5B_base", [f"{UPSTREAM}_v2v"]),  # three passes
            ("4.5B_distill_quant", ["flowcache_t2v"]),  # 8 bits, packed shards
            ("24B_distill", ["flowcache_i2v"]),  # gated, half of the channels
        ],
        [
            (
                name,
                [
                    f"{by}_{mode}"
                    for by in ("vanilla", "teacache", "flowcache", UPSTREAM)
                    for mode in MODES
                ],
            )
            for name in MAGI
        ],
    ),
)
def test_a_replica_of_magi_makes_videos(
    name: str,
    commands: Sequence[str],
    spiece: Path,
    magi_launchers: Handed,
    picture: Path,
    clip: Path,
    tmp_path: Path,
):
    config = write_magi(tmp_path / name, name, spiece, config=CONFIGS / f"{name}.json")
    tokens = str(config.parent / "example/assets/special_tokens.npz")
    flags = {"i2v": ["--image_path", str(picture)], "v2v": ["--prefix_video_path", str(clip)]}
    for command in commands:
        out, (by, mode) = tmp_path / command, command.split("_")
        if by == UPSTREAM:
            arguments = ["--config_file", str(config), "--mode", mode, "--prompt", PROMPT]
            arguments += ["--output_path", str(out / "a.mp4"), *flags.get(mode, [])]
            assert magi1_upstream.main([*arguments, f"special_tokens={tokens}"]) == 0, command
        else:
            variables = {"MODEL": str(config), "PROMPT": PROMPT, "OUT": str(out)}
            variables |= {"IMAGE": str(picture), "VIDEO": str(clip), "SPECIAL_TOKENS": tokens}
            assert magi1.main(magi_launchers(command, **variables)) == 0, command
        check_one_video(out)


# The tokenizer of a folder without tokenizer.json ------------------------------------------------

TEXTS = (
    "a red circle",
    "two  swans   glide",
    " a cat ",
    "zebra xylophone",
    "déjà vu",
    "ﬁne ２ ﬃ",
    "tab\tnew\nline",
    "",
    "a.b,c; d!",
    "snow‐ful — x",
    "日本",
    "motorcycle" * 40,
)


def test_spiece_model_alone_gives_the_tokens_of_sentencepiece(spiece: Path, tmp_path: Path):
    write_t5(tmp_path / "t5", spiece)
    tokenizer = load_tokenizer(tmp_path / "t5", vocab_size=320)
    words = SentencePieceProcessor(model_file=str(spiece))
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*words.encode(text), words.eos_id()], text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    # the extra tokens come after the words, the last one first: 32099 for <extra_id_0> of T5
    extra = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>", "<extra_id_99>"])
    first = words.vocab_size()
    assert extra == [first + 99, first + 98, first]
    assert len(tokenizer) == first + 100
    assert tokenizer("a <extra_id_0>").input_ids[-2:] == [first + 99, 1]


@pytest.mark.parametrize("kind", ["T5Tokenizer", "T5TokenizerFast", None])
def test_spiece_model_and_tokenizer_json_give_the_same_tokens(
    spiece: Path, tmp_path: Path, kind: str | None
):
    found: list[list[list[int]]] = []
    for has_json in (False, True):
        folder = tmp_path / f"{has_json}"
        write_tokenizer(folder, spiece, kind=kind or "T5Tokenizer", has_json=has_json)
        write_t5_config(folder, vocab_size=320)
        if kind is None:  # as early releases: config.json alone says which
            (folder / "tokenizer_config.json").unlink()
        tokenizer = load_tokenizer(folder, vocab_size=320)
        found.append([tokenizer(text).input_ids for text in TEXTS])
    assert found[0] == found[1]


@pytest.mark.parametrize("damage", ["half", "flipped", "text", "empty"])
@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_one_line(spiece: Path, tmp_path: Path, name: str, damage: str):
    folder = tmp_path / "t5"
    write_tokenizer(folder, spiece, kind="T5Tokenizer", has_json=name == "tokenizer.json")
    content = (folder / name).read_bytes()
    middle = len(content) // 2
    broken = {
        "half": content[:middle],
        "flipped": content[:middle] + bytes(b ^ 0x55 for b in content[middle : middle + 64]),
        "text": b"{}" if name == "tokenizer.json" else b"no such thing",
        "empty": b"",
    }
    (folder / name).write_bytes(broken[damage])
    with pytest.raises(UserError) as refused:
        load_tokenizer(folder, vocab_size=320)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
