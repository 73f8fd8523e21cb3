"""Pipelines with the calls of diffusers: a script changes one import line.

    from flowcache.diffusers import SkyReelsV2FlowCachePipeline

    pipe = SkyReelsV2FlowCachePipeline.from_pretrained(folder, preset="flowcache_fast")
    frames = pipe("a swan on a misty lake", num_frames=97).frames[0]

A model package that has such pipelines keeps them in its module `diffusers_pipeline`, whose
`__all__` names them. They are imported when they are first used, and diffusers with them.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from flowcache.runtime.model import MODELS


def __getattr__(name: str) -> Any:
    """Return a pipeline class of the model package that has one of this name."""
    if name.startswith("_"):  # Python itself asks for __path__ and the like
        raise AttributeError(name)
    known: list[str] = []
    for package in MODELS:
        if find_spec(f"{package}.diffusers_pipeline") is None:
            continue
        module = importlib.import_module(f"{package}.diffusers_pipeline")
        if name in module.__all__:
            return getattr(module, name)
        known += module.__all__
    raise AttributeError(f"flowcache.diffusers has no {name}: use {', '.join(known)}")
