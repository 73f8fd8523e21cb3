"""FlowCache in ComfyUI: load a model; text, image or video to video, with a preview per chunk.

Copy or link this folder into `custom_nodes`. See README.md next to this file.
"""

from fractions import Fraction
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.input_impl import VideoFromComponents
from comfy_api.util import VideoComponents
from PIL import Image

import flowcache
from flowcache.runtime.model import MODELS

CATEGORY = "FlowCache"
BY_NAME = "by name"
PREVIEW_PIXELS = 512
"""Longest side of a preview."""


class FlowCacheLoad:
    """Load a model once; other nodes make videos with it."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("FLOWCACHE",)
    RETURN_NAMES = ("pipe",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs of the node."""
        return {
            "required": {
                "model": ("STRING", {"default": "auto"}),
                "preset": ("STRING", {"default": "flowcache_fast"}),
            },
            "optional": {
                "architecture": ([BY_NAME, *MODELS],),
                "memory_limit": ("STRING", {"default": "auto"}),
            },
        }

    def load(
        self,
        model: str,
        preset: str,
        architecture: str = BY_NAME,
        memory_limit: str = "auto",
    ) -> tuple[Any]:
        """Return the pipeline."""
        comfy.model_management.unload_all_models()  # what ComfyUI keeps is on the same device
        return (
            flowcache.load(
                model,
                preset=preset,
                architecture=None if architecture == BY_NAME else architecture,
                progress_bar=False,
                memory_limit=memory_limit,
            ),
        )


class FlowCacheVideo:
    """Make a video from a prompt, and a start picture or frames to continue."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE", "VIDEO")
    RETURN_NAMES = ("frames", "video")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Return the inputs of the node."""
        return {
            "required": {
                "pipe": ("FLOWCACHE",),
                "prompt": ("STRING", {"multiline": True}),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2**32 - 1, "control_after_generate": True},
                ),
            },
            "optional": {
                "num_frames": ("INT", {"default": 0, "min": 0, "max": 100_000}),
                "image": ("IMAGE",),
                "video": ("IMAGE",),
                "preset": ("STRING", {"default": ""}),
                "settings": (
                    "STRING",
                    {"multiline": True, "placeholder": "reuse.threshold=0.2, one per line"},
                ),
            },
        }

    def make(
        self,
        pipe: Any,
        prompt: str,
        seed: int,
        num_frames: int = 0,
        image: torch.Tensor | None = None,
        video: torch.Tensor | None = None,
        preset: str = "",
        settings: str = "",
    ) -> tuple[torch.Tensor, Any]:
        """Return the frames, float `[T, H, W, 3]` in 0..1, and the video.

        Args:
            num_frames: 0: as the preset says.
            image: start picture, `[1, H, W, 3]` in 0..1.
            video: frames to continue, `[T, H, W, 3]` in 0..1.
            preset: empty: that of the model.
            settings: `key=value` lines.
        """
        given: dict[str, Any] = {"seed": seed, **settings_of(settings)}
        if num_frames:
            given["num_frames"] = num_frames
        if image is not None:
            given["image"] = to_uint8(image)[0]
        if video is not None:
            given["video"] = to_uint8(video)
        bar: Any = None

        def on_tick(tick: flowcache.Tick) -> None:
            nonlocal bar
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar = bar or comfy.utils.ProgressBar(tick.num_ticks)
            bar.update_absolute(tick.index + 1, tick.num_ticks)

        def on_part(part: flowcache.Part) -> None:
            if bar is not None:
                preview = ("JPEG", Image.fromarray(part.frames[-1]), PREVIEW_PIXELS)
                bar.update_absolute(bar.current, bar.total, preview)

        made = pipe(prompt, preset=preset or None, on_tick=on_tick, on_part=on_part, **given)
        frames = torch.from_numpy(made.frames.astype(np.float32) / 255)
        components = VideoComponents(images=frames, audio=None, frame_rate=Fraction(made.fps))
        return frames, VideoFromComponents(components)


def settings_of(text: str) -> dict[str, str]:
    """Return `key=value` lines as a mapping."""
    pairs = [line.partition("=") for line in text.splitlines() if line.strip()]
    wrong = next((key for key, equals, _ in pairs if not equals), None)
    if wrong is not None:
        raise ValueError(f"settings: {wrong!r} is no key=value line")
    return {key.strip(): value.strip() for key, _, value in pairs}


def to_uint8(images: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Turn float pixels in 0..1 into uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


NODE_CLASS_MAPPINGS = {"FlowCacheLoad": FlowCacheLoad, "FlowCacheVideo": FlowCacheVideo}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FlowCacheLoad": "FlowCache: load model",
    "FlowCacheVideo": "FlowCache: video",
}
