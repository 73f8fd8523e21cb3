"""Upstream's command lines: flags, defaults, meanings, file names, and whole runs."""

import json
import shutil
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flowcache.errors import UserError
from flowcache.runtime.config import load_config
from flowcache.runtime.model import Request
from flowcache.runtime.run import config_layers
from flowcache.runtime.video import probe
from skyreels_v2.config import RunConfig
from skyreels_v2.enhance import MAX_NEW_TOKENS, enhance
from skyreels_v2.model import FOLDERS
from skyreels_v2.released import PRESETS
from skyreels_v2.upstream import Script, main, parser_of, request_of

DF: Script = "generate_video_df.py"
PLAIN: Script = "generate_video.py"

Refused = Callable[..., str]
SHORT = ["--num_frames", "9", "--inference_steps", "2", "--seed", "4", "--prompt", "a red circle"]


def request(script: Script, *arguments: str) -> Request:
    return request_of(script, parser_of(script).parse_intermixed_args(arguments))


def config(script: Script, *arguments: str) -> RunConfig:
    """The settings that a command line means."""
    asked = request(script, *arguments)
    layers = config_layers(
        PRESETS / "base.yaml", PRESETS / "base.yaml", checkpoint=FOLDERS.find(asked.model).folder
    )
    return load_config(RunConfig, layers, overrides=asked.overrides)


@pytest.fixture(scope="module")
def bare(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without presets and with the released 1.3B model's sizes, but no weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "bare"
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("presets"))
    path = folder / "transformer/config.json"
    sizes = {"attention_head_dim": 128, "num_attention_heads": 12, "num_layers": 30}
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes | {"ffn_dim": 8960}))
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chat model that knows a few words."""
    folder = tmp_path_factory.mktemp("chat")
    words = ["<pad>", "<end>", "<unk>", "red", "circle", "moves", "slowly", "light", "user"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}user "
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=1024,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(folder)
    return folder


# Defaults and meanings ----------------------------------------------------------------------


def values(made: Any, keys: Iterable[str]) -> dict[str, Any]:
    return {key: attrgetter(key)(made) for key in keys}


def test_the_defaults_are_upstreams(bare: Path):
    shared: dict[str, Any] = {"fps": 24, "num_frames": 97, "base_num_frames": 97, "num_steps": 30}
    shared |= {"overlap_history": None, "shift": 8.0, "guidance": 6.0, "ar_step": 0}
    shared |= {"attention": "full", "reuse.policy": "vanilla", "kv.compress": "none", "image": None}
    shared |= {"end_image": None, "video": None, "offload": False, "addnoise_condition": 0}
    rows: list[tuple[Script, str, dict[str, Any]]] = [
        (DF, "540P", {"height": 544, "width": 960, "causal_block_size": 1}),
        (PLAIN, "720P", {"height": 720, "width": 1280, "causal_block_size": 25}),
    ]
    for script, size, own in rows:
        made = config(script, "--model_id", str(bare), "--resolution", size)
        assert values(made, shared | own) == shared | own
        assert made.prompt
    options = parser_of(DF).parse_args([])
    assert options.model_id == "Skywork/SkyReels-V2-DF-1.3B-540P"
    assert options.prompt_enhancer_model == "Qwen/Qwen2.5-32B-Instruct"
    assert parser_of(PLAIN).parse_args([]).model_id == "Skywork/SkyReels-V2-T2V-14B-540P"


def test_one_window_may_be_longer_than_usual(bare: Path):
    size = ("--model_id", str(bare), "--resolution", "540P", "--num_frames", "121")
    made = config(PLAIN, *size)
    assert (made.base_num_frames, made.causal_block_size) == (121, 31)


TEACACHE = {
    "attention": "full",
    "reuse.policy": "teacache",
    "reuse.threshold": 0.2,
    "reuse.signal": "timestep_embedding",
    "reuse.warmup_steps": 1,
    "reuse.rescale": "auto",
}
RET_STEPS = {"reuse.signal": "timestep", "reuse.warmup_steps": 5}
FLOWCACHE = TEACACHE | {"attention": "causal", "clean_pass": False, "reuse.policy": "flowcache"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--num_frames 257 --overlap_history 17", {"num_frames": 257, "overlap_history": 17}),
        ("--base_num_frames 121", {"base_num_frames": 121}),
        ("--addnoise_condition 20", {"addnoise_condition": 20}),
        ("--ar_step 5 --causal_block_size 5", {"ar_step": 5, "causal_block_size": 5}),
        ("--causal_attention", {"attention": "causal", "clean_pass": True}),
        ("--inference_steps 50 --shift 5", {"num_steps": 50, "shift": 5.0}),
        ("--guidance_scale 1 --fps 16", {"guidance": 1.0, "fps": 16}),
        ("--image a.png --end_image b.png", {"image": "a.png", "end_image": "b.png"}),
        ("--end_image b.png", {"image": None, "end_image": "b.png"}),
        ("--video_path c.mp4 --overlap_history 17", {"video": "c.mp4", "overlap_history": 17}),
        ("--offload", {"offload": True}),
        ("--seed 1024", {"seed": 1024}),
        ("num_steps=9 --inference_steps 50", {"num_steps": 9}),
        # upstream's TeaCache
        ("--teacache", TEACACHE),
        (
            "--teacache --use_ret_steps --teacache_thresh 0.3",
            TEACACHE | RET_STEPS | {"reuse.threshold": 0.3},
        ),
        ("--teacache --causal_attention", {"attention": "causal", "reuse.policy": "teacache"}),
        # the published FlowCache code
        (
            "--teacache --use_ret_steps --teacache_thresh 0.1 --flowcache",
            FLOWCACHE | RET_STEPS | {"reuse.threshold": 0.1, "kv.compress": "none"},
        ),
        (
            "--flowcache",
            FLOWCACHE | {"reuse.signal": "timestep", "reuse.rescale": "t2v-1.3b"},
        ),
        (
            "--teacache --use_ret_steps --use_compress --budget_block 2",
            FLOWCACHE
            | RET_STEPS
            | {"kv.compress": "importance", "kv.budget_chunks": 2.0, "kv.order": "score"},
        ),
        ("--use_compress", {"attention": "causal", "kv.compress": "none"}),
        ("--use_kvrange --kvrange 3", {"kv.compress": "recent", "kv.budget_chunks": 3.0}),
        (
            "--use_kvrange --kvrange 3 --use_compress --budget_block 1",
            {"kv.compress": "importance", "kv.budget_chunks": 1.0},
        ),
        ("--use_kvrange", {"reuse.policy": "vanilla", "kv.budget_chunks": 0.0}),
    ],
)
def test_a_flag_of_the_forcing_script_has_upstreams_meaning(
    bare: Path, flags: str, expected: dict[str, Any]
):
    made = config(DF, "--model_id", str(bare), "--resolution", "540P", *flags.split())
    assert values(made, expected) == expected


def test_teacache_without_guidance_flags_is_the_same_in_both_scripts(bare: Path):
    flags = ("--model_id", str(bare), "--resolution", "540P", "--teacache", "--use_ret_steps")
    assert config(DF, *flags).reuse == config(PLAIN, *flags).reuse


def test_a_seed_is_drawn_where_none_is_given(bare: Path):
    size = ("--model_id", str(bare), "--resolution", "540P")
    seeds = {config(DF, *size).seed for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed <= 4294967293 for seed in seeds)


def test_a_checkpoint_may_know_its_own_size(small: Path, caplog: pytest.LogCaptureFixture):
    made = config(DF, "--model_id", str(small))
    assert (made.height, made.width, made.num_steps) == (16, 32, 3)
    assert (made.num_frames, made.causal_block_size, made.shift) == (97, 1, 8.0)
    assert config(DF, "--model_id", str(small), "--inference_steps", "5").num_steps == 5
    assert not caplog.messages
    assert config(DF, "--model_id", str(small), "--resolution", "540P").height == 16
    assert "--resolution 540P is left out: this checkpoint makes videos of its own size" in (
        caplog.text
    )


def test_teacache_of_a_published_flowcache_command_is_pointed_out(
    bare: Path, caplog: pytest.LogCaptureFixture
):
    flags = ("--model_id", str(bare), "--resolution", "540P", "--teacache", "--expname", "x")
    config(DF, *flags)
    assert "add --flowcache" in caplog.text
    caplog.clear()
    config(DF, *flags, "--flowcache")
    assert not caplog.messages


# File names ---------------------------------------------------------------------------------


def stem(bare: Path, prompt: str, *flags: str) -> tuple[Path, str]:
    size = ("--model_id", str(bare), "--resolution", "540P", "--seed", "7")
    asked = request(DF, *size, f"--prompt={prompt}", *flags)
    assert asked.stem is not None
    return asked.folder, asked.stem


def test_a_file_is_named_after_prompt_seed_and_time(bare: Path):
    folder, name = stem(bare, "a cat/dog " + "x" * 200)
    assert folder == Path("result/diffusion_forcing")
    assert name.startswith("a catdog " + "x" * 90 + "_7_20")
    assert "/" not in name
    assert stem(bare, "a", "--outdir", "mine")[0] == Path("result/mine")
    assert stem(bare, "a", "--expname", "slow")[1] == "slow-0"


@pytest.mark.parametrize("prompt", ["猫" * 150, "🎩" * 150, "../../etc", "a\nb\tc", ".hidden"])
def test_any_prompt_makes_a_file_name(bare: Path, prompt: str):
    _, name = stem(bare, prompt)
    assert len(name.encode()) < 240
    assert name.isprintable()
    assert "/" not in name
    assert not name.startswith(".")


# Mistakes -----------------------------------------------------------------------------------


@pytest.fixture
def refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> Refused:
    """Return what runs a command line in an empty folder and gives its one line of error."""
    monkeypatch.chdir(tmp_path)

    def run(script: Script, *arguments: str) -> str:
        assert main(script, ["--model_id", str(small), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--use_usp", "start it with torchrun --nproc_per_node=N generate_video_df.py"),
        ("--addnoise_condition 61", "addnoise_condition must be in 0..60"),
        ("--num_frames 98", "num_frames must be 4 n + 1"),
        ("--num_frames 121", "give overlap_history"),
        ("--causal_block_size 0", "causal_block_size must be in 1..1000000"),
        ("--ar_step -1", "ar_step must be in 0..1000"),
        ("--seed -1", "seed must be in 0.."),
        ("--shift nan", "shift"),
        ("--guidance_scale inf", "guidance"),
        ("--teacache_thresh -1", "reuse.threshold must be in 0..1000000000"),
        ("--inference_steps 0", "num_steps must be in 1..1000"),
        ("--video_path missing.mp4 --overlap_history 17", "missing.mp4: no such file"),
        ("--video_path missing.mp4", "--video_path needs --overlap_history"),
        ("--image missing.png", "missing.png: no such file"),
        ("--end_image missing.png", "missing.png: no such file"),
        ("--prompt=", "prompt is empty"),
        ("--model_id nowhere --resolution 540P", "nowhere: no such folder"),
        ("--model_id nobody/nothing --resolution 540P", "HF_HUB_OFFLINE forbids a download"),
        ("--model_id nobody/nothing", "--resolution is missing: give 540P"),
        ("--use_compress --budget_block -1 --flowcache wrong=1", "unknown key 'wrong'"),
    ],
)
def test_a_mistake_is_one_line(refused: Refused, flags: str, message: str):
    assert message in refused(DF, *flags.split())


def test_guidance_below_one_is_refused_where_it_is_always_applied(refused: Refused):
    assert "--guidance_scale must be 1" in refused(PLAIN, "--guidance_scale", "0.5")


def test_models_are_told_apart(refused: Refused, small_i2v: Path, picture: Path):
    image = ("--image", str(picture), "--num_frames", "9")
    assert "takes no image" in refused(PLAIN, *image)
    assert "use generate_video.py" in refused(DF, *image, "--model_id", str(small_i2v))
    assert "give image" in refused(PLAIN, "--model_id", str(small_i2v))


def test_flags_that_do_not_exist_are_one_line(capsys: pytest.CaptureFixture[str]):
    for arguments in (["--frobnicate"], ["--resolution", "4K"], ["--seed", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(DF, arguments)
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


# Whole runs ---------------------------------------------------------------------------------


def made_in(folder: Path) -> tuple[Path, dict[str, Any]]:
    (video,) = folder.glob("*.mp4")
    return video, json.loads(video.with_suffix(".json").read_text())


def test_a_published_flowcache_command_makes_a_video(small: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    flags = "--num_frames 33 --base_num_frames 17 --overlap_history 9 --ar_step 2 --seed 1024"
    flags += " --causal_block_size 3 --inference_steps 4 --addnoise_condition 20 --offload"
    flags += " --teacache --teacache_thresh 0.1 --use_ret_steps --use_compress --budget_block 1"
    flags += " --outdir kv --expname kvcompress"
    assert main(DF, ["--model_id", str(small), *flags.split()]) == 0
    video, report = made_in(tmp_path / "result/kv")
    assert video.name == "kvcompress-0.mp4"
    assert probe(video).num_frames == 33
    assert report["config"]["reuse"]["policy"] == "flowcache"


@pytest.mark.parametrize(
    ("flags", "num_frames"),
    [
        (["--resolution", "540P"], 9),
        (["--end_image", "{picture}"], 9),
        (["--video_path", "{clip}", "--overlap_history", "5"], 20 + 9 - 5),
    ],
    ids=["from a prompt", "an end image alone", "an extension"],
)
def test_the_forcing_script_makes_a_video(
    small: Path,
    tmp_path: Path,
    picture: Path,
    clip: Path,
    monkeypatch: Any,
    flags: list[str],
    num_frames: int,
):
    monkeypatch.chdir(tmp_path)
    given = [flag.format(picture=picture, clip=clip) for flag in flags]
    assert main(DF, ["--model_id", str(small), *SHORT, *given]) == 0
    video, report = made_in(tmp_path / "result/diffusion_forcing")
    assert video.name.startswith("a red circle_4_20")
    assert probe(video).num_frames == num_frames
    assert report["config"]["seed"] == 4


def test_the_other_script_makes_videos_from_text_and_from_an_image(
    small_i2v: Path, tmp_path: Path, picture: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    flags = [*SHORT, "--image", str(picture), "--teacache", "--use_ret_steps"]
    assert main(PLAIN, ["--model_id", str(small_i2v), *flags]) == 0
    video, report = made_in(tmp_path / "result/video_out")
    assert probe(video).num_frames == 9
    assert report["config"]["causal_block_size"] == 3
    assert set(report["stats"]["passes"]["per_branch"]) == {"cond", "uncond"}


def test_a_dry_run_prints_seed_and_plan(
    small: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(DF, ["--model_id", str(small), *SHORT, "--dry_run"]) == 0
    assert "9 frames of 32x16 at 24 fps, seed 4" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.mp4"))


# The prompt enhancer ------------------------------------------------------------------------


def test_a_chat_model_writes_the_prompt_out_always_the_same_way(chat_model: Path):
    cpu = torch.device("cpu")
    first, second = (enhance("red circle", model=str(chat_model), device=cpu) for _ in range(2))
    assert first == second
    assert 0 < len(first.split()) <= MAX_NEW_TOKENS
    assert "<" not in first.replace("<unk>", "")


def test_what_is_no_chat_model_is_refused(tmp_path: Path, chat_model: Path):
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="cannot be loaded"):
        enhance("red circle", model=str(tmp_path), device=cpu)
    silent = tmp_path / "silent"
    shutil.copytree(chat_model, silent, ignore=shutil.ignore_patterns("*.jinja"))
    with pytest.raises(UserError, match="no chat template"):
        enhance("red circle", model=str(silent), device=cpu)


def test_an_enhanced_prompt_is_used_and_kept(
    small: Path,
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    flags = ["--prompt_enhancer", "--prompt_enhancer_model", str(chat_model)]
    assert main(PLAIN, ["--model_id", str(small), *SHORT, *flags]) == 0
    written = enhance("a red circle", model=str(chat_model), device=torch.device("cpu"))
    video, report = made_in(tmp_path / "result/video_out")
    assert report["config"]["prompt"] == written
    assert video.name.startswith("a red circle_4_")
    assert f"prompt       {written}\n" in capsys.readouterr().out
