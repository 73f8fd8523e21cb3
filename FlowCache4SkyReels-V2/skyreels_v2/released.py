"""Where the demo and the presets are, and names of the released models; nothing is imported."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
PRESETS = FOLDER / "configs"
DEMO = FOLDER / "demo"
REAL_MODEL = "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"
"""What `auto` is where there is CUDA."""
RELEASED = (
    *("df-1.3b-540p", "df-14b-540p", "df-14b-720p"),
    *("t2v-14b-540p", "t2v-14b-720p"),
    *("i2v-1.3b-540p", "i2v-14b-540p", "i2v-14b-720p"),
)
"""By the end of the repository's name, in lower case; sizes: `checkpoint.released_sizes`."""


def released_name(repository: str) -> str | None:
    """Return the name here of a repository of the hub, in either layout; None: another model."""
    name = repository.lower().removeprefix("skywork/skyreels-v2-").removesuffix("-diffusers")
    return name if name in RELEASED else None
