"""Where SkyReels-V2's checkpoints are found, and the sizes of the released ones."""

from dataclasses import replace
from pathlib import Path

from flowcache.errors import UserError
from flowcache.wan.dit import CLIP_WIDTH, DiTConfig
from flowcache.wan.folder import Folders
from skyreels_v2.released import DEMO, REAL_MODEL, RELEASED, released_name

FOLDERS = Folders(
    "SkyReels-V2 checkpoint",
    demo=DEMO,
    no_demo="the demo checkpoint is missing: restore it from the repository",
    real=REAL_MODEL,
    released=RELEASED,
)


def released_sizes(name: str) -> DiTConfig:
    """Return the sizes of a released model, which plan a run without its files.

    Source: the `config.json` files of the released checkpoints.
    """
    sizes = DiTConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824)
    if "-1.3b-" in name:
        sizes = DiTConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960)
    if name.startswith("i2v-"):
        return replace(sizes, model_type="i2v", in_dim=36, image_dim=CLIP_WIDTH)
    return replace(sizes, inject_sample_info=name == "df-1.3b-540p")


def is_checkpoint(name: str) -> bool:
    """Tell whether a folder, or a repository of the hub, holds a SkyReels-V2 model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return released_name(name) is not None
    try:
        FOLDERS.find_in(folder)
    except UserError:
        return False
    return True
