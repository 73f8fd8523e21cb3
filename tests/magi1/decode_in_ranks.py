"""Decode in one of several processes: `python decode_in_ranks.py VAE FOLDER LAYOUT...`.

Reads FOLDER/latents.pt. A layout is "2x1", branch groups by sequence ranks. The frames of each are
written to FOLDER/RANK.pt.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flowcache.runtime.ending import Place
from flowcache.runtime.parallel import PATIENCE, Layout, process_group
from magi1.vae import Tiling, load


def main() -> None:
    torch.set_num_threads(1)  # as the test: the frames must have the same bits
    vae_folder, folder, *layouts = sys.argv[1:]
    vae = load(vae_folder, scale=1.0, dtype=torch.float32, device="cpu")
    vae.tiling = Tiling(frames=8, height=16, width=16)
    latents = torch.load(Path(folder) / "latents.pt")
    with process_group(Place.of(os.environ), timeout=PATIENCE) as ranks:
        made = {}
        for layout in layouts:
            branch, sequence = map(int, layout.split("x"))
            divided = replace(ranks, layout=Layout(branch, sequence)).divided(torch.device("cpu"))
            made[layout] = vae.decode(latents, divided)
        torch.save(made, Path(folder) / f"{ranks.place.rank}.pt")


if __name__ == "__main__":
    main()
