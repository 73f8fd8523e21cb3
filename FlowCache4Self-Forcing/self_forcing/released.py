"""Where the demo and the presets are, and names of the released models; nothing is imported."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
PRESETS = FOLDER / "configs"
DEMO = FOLDER / "demo"
REAL_MODEL = "Wan-AI/Wan2.1-T2V-1.3B"
"""What `auto` is where there is CUDA: the base model; a preset names the weights."""
RELEASED = ("wan2.1-t2v-1.3b",)
"""Names that plan a run without files."""
