"""A stand-in for the names of ComfyUI that the nodes use, and the nodes on top of it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"


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


def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
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


def load_nodes() -> dict[str, Any]:
    """Import the folder of the nodes; the stand-in, or ComfyUI, must be in place."""
    spec = importlib.util.spec_from_file_location("flowcache_nodes", FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    return module.NODE_CLASS_MAPPINGS
