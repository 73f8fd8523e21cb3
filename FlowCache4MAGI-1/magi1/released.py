"""Where demos, presets and JSON configs are, and names of the released models."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent
DEMOS = {
    "demo": _FOLDER / "demo" / "distill_config.json",
    "demo-base": _FOLDER / "demo" / "base_config.json",
}
"""Distilled (one pass) and base (three guidance passes)."""
PRESETS = _FOLDER / "configs"
CONFIGS = PRESETS / "released"
FIELDS = CONFIGS / "fields.yaml"
"""What the fields of the release's JSON files mean."""
RELEASED = (
    *("4.5B_base", "4.5B_distill", "4.5B_distill_quant"),
    *("24B_base", "24B_distill", "24B_distill_quant"),
)
REAL_MODEL = "4.5B_distill"
REPOSITORY = "sand-ai/MAGI-1"
