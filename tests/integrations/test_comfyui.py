"""The nodes for ComfyUI, with a stand-in of the names that they use of it."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfyui import InterruptedByUserError, load_nodes, stand_in
from PIL import Image

from flowcache.errors import UserError

PROMPT = "a red circle moving right on a black background"


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return stand_in(monkeypatch)


@pytest.fixture
def nodes(comfy: SimpleNamespace) -> dict[str, Any]:
    assert comfy is not None
    return load_nodes()


@pytest.fixture
def pipe(nodes: dict[str, Any]) -> Any:
    node = nodes["FlowCacheLoad"]()
    return getattr(node, node.FUNCTION)("demo", "flowcache_fast", "skyreels_v2")[0]


def test_a_node_makes_frames_and_a_video_and_shows_each_chunk(
    nodes: dict[str, Any], pipe: Any, comfy: SimpleNamespace
):
    node = nodes["FlowCacheVideo"]()
    inputs = node.INPUT_TYPES()
    assert inputs["required"]["pipe"] == nodes["FlowCacheLoad"].RETURN_TYPES
    frames, video = getattr(node, node.FUNCTION)(
        pipe, PROMPT, seed=7, num_frames=33, settings="num_steps=8\n"
    )
    expected = pipe(PROMPT, seed=7, num_frames=33, num_steps=8)
    assert frames.shape == (33, 64, 64, 3)
    assert torch.equal((frames * 255).round().to(torch.uint8), torch.from_numpy(expected.frames))
    assert video.images is frames
    assert video.frame_rate == Fraction(24)
    [bar] = comfy.bars
    assert bar.current == bar.total
    assert [shown[0] for _, shown in bar.previews] == ["JPEG", "JPEG"]
    assert isinstance(bar.previews[0][1][1], Image.Image)
    assert bar.previews[0][0] < bar.total  # the first chunk is shown before the last tick


def test_a_start_picture_is_the_first_frame_given(nodes: dict[str, Any], pipe: Any):
    node = nodes["FlowCacheVideo"]()
    picture = torch.linspace(0, 1, 64).expand(1, 64, 64).unsqueeze(-1).expand(1, 64, 64, 3)
    frames, _ = node.make(pipe, PROMPT, 1, 17, image=picture, settings="num_steps=4")
    pixels = (picture[0].numpy() * 255).round().astype(np.uint8)
    expected = pipe(PROMPT, seed=1, num_frames=17, num_steps=4, image=pixels).frames
    assert np.array_equal((frames * 255).round().to(torch.uint8).numpy(), expected)


def test_cancel_ends_the_run_and_the_pipeline_goes_on(
    nodes: dict[str, Any], pipe: Any, comfy: SimpleNamespace
):
    node = nodes["FlowCacheVideo"]()
    comfy.stops_after = 3
    with pytest.raises(InterruptedByUserError):
        node.make(pipe, PROMPT, 1, 17, settings="num_steps=8")
    comfy.stops_after = None
    frames, _ = node.make(pipe, PROMPT, 1, 17, settings="num_steps=4")
    assert len(frames) == 17


def test_wrong_settings_are_one_line(nodes: dict[str, Any], pipe: Any):
    node = nodes["FlowCacheVideo"]()
    with pytest.raises(ValueError, match="'steps 4' is no key=value line"):
        node.make(pipe, PROMPT, 1, settings="steps 4")
    with pytest.raises(UserError, match="unknown key 'num_stepz'"):
        node.make(pipe, PROMPT, 1, settings="num_stepz=4")
