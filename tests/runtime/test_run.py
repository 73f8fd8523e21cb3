"""Where results go, and which settings win."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.checks import Decoded
from flowcache.runtime.model import Request
from flowcache.runtime.overlap import done
from flowcache.runtime.run import claim_output, collect, config_layers
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick


@dataclass(frozen=True)
class Progress:
    """What a made-up pipeline yields."""

    tick: Tick
    later: Future[Decoded] | None


def decoded(frames: Tensor) -> Decoded:
    return Decoded(frames, torch.tensor(True))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_checkpoints_own_values_stand_above_the_layer_of_the_same_name(tmp_path: Path):
    base, fast, slow = (tmp_path / f"configs/{name}.yaml" for name in ("base", "fast", "slow"))
    model, own = tmp_path / "model/config.json", tmp_path / "model/presets"
    touch(base, fast, slow, model, own / "base.yaml", own / "fast.yaml")

    def layers(preset: Path) -> list[Path]:
        return config_layers(base, preset, checkpoint=model.parent, model=[model])

    assert layers(fast) == [base, model, own / "base.yaml", fast, own / "fast.yaml"]
    assert layers(slow) == [base, model, own / "base.yaml", slow]
    assert layers(base) == [base, model, own / "base.yaml"]
    assert config_layers(base, slow, checkpoint=None) == [base, slow]


@pytest.mark.parametrize("name", ["a.mp4", "a.json", "a.record.json"])
def test_nothing_that_exists_is_overwritten_unasked(tmp_path: Path, name: str):
    touch(tmp_path / name)
    out = str(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="exists and is kept"):
        claim_output(Request(out=out, record=True), stem="b")
    assert claim_output(Request(out=out, record=True, overwrite=True), stem="b") == Path(out)


def test_a_record_that_is_not_asked_for_is_no_hindrance(tmp_path: Path):
    touch(tmp_path / "a.record.json")
    assert claim_output(Request(out=str(tmp_path / "a.mp4")), stem="b") == tmp_path / "a.mp4"


def test_a_folder_gets_a_fresh_name(tmp_path: Path):
    touch(tmp_path / "fast-3.mp4")
    request = Request(out=str(tmp_path))
    assert claim_output(request, stem="fast-3") == tmp_path / "fast-3-001.mp4"
    named = Request(folder=tmp_path / "new", stem="mine")
    assert claim_output(named, stem="fast-3") == tmp_path / "new/mine.mp4"
    assert not (tmp_path / "new").exists()


def test_a_collected_clip_holds_the_frames_of_all_ticks_in_order():
    stats = RunStats(torch.device("cpu"))
    black, white = torch.full((3, 2, 4, 4), -1.0), torch.ones(3, 1, 4, 4)
    ticks = [Tick(index, 3, 3, {0: index}) for index in range(3)]
    laters = (None, done(decoded(black)), done(decoded(white)))
    shown = [Progress(*each) for each in zip(ticks, laters, strict=True)]
    clip = collect(shown, stats)
    assert clip.stats is stats
    assert clip.frames.shape == (3, 4, 4, 3)
    assert clip.frames.dtype == torch.uint8
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 0, 255]
