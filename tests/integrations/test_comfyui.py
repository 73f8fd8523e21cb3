"""The nodes for ComfyUI, with a stand-in of the names that they use of it."""

import importlib.util
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowcache.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
PROMPT = "a red circle moving right on a black background"


class InterruptedByUserError(Exception):
    """As ComfyUI raises it where Cancel was pressed."""


class Bar:
    """`comfy.utils.ProgressBar`: keeps what it is shown."""

    made: list["Bar"] = []  # noqa: RUF012

    def __init__(self, total: int) -> None:
        self.total, self.current = total, 0
        self.previews: list[Any] = []
        self.made.append(self)

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.current, self.total = value, total or self.total
        if preview is not None:
            self.previews.append((value, preview))


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put the stand-in in place; return its state."""
    state = SimpleNamespace(stops_after=None, num_checks=0, bars=Bar.made)
    Bar.made.clear()

    def check() -> None:
        state.num_checks += 1
        if state.num_checks == state.stops_after:
            raise InterruptedByUserError

    names: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": Bar},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": check,
            "unload_all_models": lambda: None,
        },
        "comfy_api": {},
        "comfy_api.util": {"VideoComponents": SimpleNamespace},
        "comfy_api.input_impl": {"VideoFromComponents": lambda parts: parts},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return state


@pytest.fixture
def nodes(comfy: SimpleNamespace) -> dict[str, Any]:
    assert comfy is not None
    spec = importlib.util.spec_from_file_location("flowcache_nodes", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    return module.NODE_CLASS_MAPPINGS


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
