"""Where models are, and sizes of the released ones, which plan a run without weights.

Source: the `config.json` files of the released checkpoints.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from flowcache.wan.dit import DiTConfig

FOLDER = Path(__file__).resolve().parent.parent
PRESETS = FOLDER / "configs"
DEMO = FOLDER / "demo"
REAL_MODEL = "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"
"""What `auto` is where there is CUDA."""

_SMALL = DiTConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
_LARGE = DiTConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)


def _i2v(config: DiTConfig) -> DiTConfig:
    return replace(config, model_type="i2v", in_dim=36, image_dim=1280)


RELEASED: Mapping[str, DiTConfig] = MappingProxyType(
    {
        "df-1.3b-540p": replace(_SMALL, inject_sample_info=True),
        "df-14b-540p": _LARGE,
        "df-14b-720p": _LARGE,
        "t2v-14b-540p": _LARGE,
        "t2v-14b-720p": _LARGE,
        "i2v-1.3b-540p": _i2v(_SMALL),
        "i2v-14b-540p": _i2v(_LARGE),
        "i2v-14b-720p": _i2v(_LARGE),
    }
)
"""By the end of the repository's name, in lower case."""


def released_name(repository: str) -> str | None:
    """Return the name here of a repository of the hub, in either layout; None: another model."""
    name = repository.lower().removeprefix("skywork/skyreels-v2-").removesuffix("-diffusers")
    return name if name in RELEASED else None
