#!/usr/bin/env python
"""Score the videos of a folder in dimensions of VBench: `score.py VIDEOS OUT DIMENSION...`.

Runs in VBench's environment and calls its Python interface, as its own command works on CUDA alone:
here a single process needs no NCCL, and dimensions without a model can be scored on a CPU. With
torchrun each process takes a part of the videos, as in VBench's own command.

Where VIDEOS holds what `sample.py --num-prompts` wrote, only its prompts count.
"""

import json
import os
import sys
from datetime import datetime
from pathlib import Path

import torch
import vbench
from vbench.distributed import dist_init

PROMPTS_FILE = "vbench_prompts.json"


def full_info(videos: Path, out: Path, dimension: str) -> Path:
    """Return VBench's list of prompts, or a shorter one for a part of a dimension."""
    path = Path(vbench.__file__).with_name("VBench_full_info.json")
    chosen = videos / PROMPTS_FILE
    wanted = json.loads(chosen.read_text(encoding="utf-8")) if chosen.is_file() else {}
    if dimension not in wanted:
        return path
    prompts = set(wanted[dimension])
    rows = json.loads(path.read_text(encoding="utf-8"))
    kept = [row for row in rows if dimension in row["dimension"] and row["prompt_en"] in prompts]
    missing = prompts - {row["prompt_en"] for row in kept}
    if missing:
        raise SystemExit(f"error: {chosen}: VBench has no prompt {min(missing)!r} of {dimension}")
    out.mkdir(parents=True, exist_ok=True)
    part = out / "prompts.json"
    part.write_text(json.dumps(kept), encoding="utf-8")
    return part


def main() -> None:
    """Run the command line."""
    videos, out = Path(sys.argv[1]), Path(sys.argv[2])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist_init()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dimension in sys.argv[3:]:
        folder = out / dimension
        judge = vbench.VBench(device, str(full_info(videos, folder, dimension)), str(folder))
        judge.evaluate(
            videos_path=str(videos / "videos"),
            name=f"results_{datetime.now():%Y-%m-%d-%H:%M:%S}",
            dimension_list=[dimension],
            imaging_quality_preprocessing_mode="longer",  # VBench's own choice
        )


if __name__ == "__main__":
    main()
