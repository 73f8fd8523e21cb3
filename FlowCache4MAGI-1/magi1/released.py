"""Where demos, presets and JSON configs are, and names of the released models."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
DEMO = FOLDER / "demo"
DEMOS = {"demo": "distill_config.json", "demo-base": "base_config.json"}
"""Distilled (one pass) and base (three guidance passes)."""
PRESETS = FOLDER / "configs"
CONFIGS = PRESETS / "released"
FIELDS = CONFIGS / "fields.yaml"
"""What the fields of the release's JSON files mean."""
RELEASED = (
    *("4.5B_base", "4.5B_distill", "4.5B_distill_quant"),
    *("24B_base", "24B_distill", "24B_distill_quant"),
)
REAL_MODEL = "4.5B_distill"
REPOSITORY = "sand-ai/MAGI-1"
