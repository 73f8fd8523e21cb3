"""Loads the commands of `scripts/` as modules."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from self_forcing import demo

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Return a function that loads `scripts/NAME.py`."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def self_forcing_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Self-Forcing demo whose transformers are the one that training starts from."""
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    dit = demo.new_dit()
    demo.write_checkpoint(dit, dit, folder)
    demo.write_presets(folder)
    return folder
