#!/usr/bin/env python
"""Compare videos with reference videos of the same prompts and seeds: PSNR, SSIM, LPIPS.

A and B are two clips, or two folders whose clips are matched by name without suffix. A clip is a
video, an .npy or .npz of uint8 pixels [T, H, W, 3], or a folder of PNG files. Published figures
are of decoded mp4 files, so they hold the codec's noise; compare arrays or PNG files to leave it
out.

If both clips have their reports, NAME.json of NAME.mp4, a warning names every setting apart from
the cache's in which the runs differ (attention, steps, seed, guidance, size, ...), and what to
compare with instead.

Per frame and per clip: PSNR of one mean squared error over the whole clip, SSIM with data range 1,
LPIPS as the mean of AlexNet's spatial map. Over clips: the mean and its 95 % confidence interval
by Student's t.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.errors import UserError
from flowcache.report.comparison import FILES, compare, text_table, write_files
from flowcache.runtime.cli import Parser, choose_device, run_command
from flowcache.runtime.files import check_free, made_folder
from flowcache.runtime.metrics import METRICS

EXIT_SOME_FAILED = 1
EXAMPLES = """examples:
  python scripts/compare.py flowcache.mp4 vanilla.mp4
  python scripts/compare.py result/flowcache result/vanilla --out result/compare
  python scripts/compare.py flowcache.npy vanilla.npy --metrics psnr,ssim --device cpu
  python scripts/compare.py flowcache.mp4 vanilla.mp4 --lpips-weights weights/

LPIPS needs the weights of AlexNet, alexnet-owt-7be5be79.pth: in torch's cache, or where
--lpips-weights says. Nothing is downloaded. --out writes compare.json (everything), compare.csv
(a row per frame, and one whose frame is "all" per clip) and compare.md (the table).

Exit code: 0; 1 if some clips of two folders could not be compared; 2 if something given is wrong.
"""


def parse_metrics(text: str) -> tuple[str, ...]:
    """Turn `psnr,ssim` into a tuple of different metrics."""
    names = tuple(text.split(","))
    if len(set(names)) != len(names) or not set(names) <= set(METRICS):
        raise UserError(f"--metrics is {text!r}, but must be some of {','.join(METRICS)}")
    return names


def execute(options: argparse.Namespace) -> int:
    """Compare, print, write; return the exit code."""
    metrics = parse_metrics(options.metrics)
    out: Path | None = options.out
    if out is not None:
        for name in FILES:
            advice = "choose another --out, or --overwrite"
            check_free(out / name, overwrite=options.overwrite, advice=advice)
    device = choose_device(options.device)
    with nullcontext() if out is None else made_folder(out):
        found = compare(
            options.a,
            options.b,
            metrics=metrics,
            weights=options.lpips_weights,
            device=device,
        )
    print(text_table(found) if found.clips else "no clip could be compared")
    if out is not None:
        write_files(found, out, (options.a, options.b), device=device)
    for reason in found.failures.values():
        sys.stderr.write(f"not compared: {reason}\n")
    return EXIT_SOME_FAILED if found.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(
        prog="python scripts/compare.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", type=Path, help="clip or folder of clips to judge")
    parser.add_argument("b", metavar="B", type=Path, help="reference clip or folder")
    parser.add_argument("--metrics", default=",".join(METRICS), help="default: psnr,ssim,lpips")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument(
        "--lpips-weights", type=Path, metavar="PATH", help="AlexNet's file, or its folder"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {', '.join(FILES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    options = parser.parse_args(arguments)
    codes: list[int] = []
    return run_command(lambda: codes.append(execute(options))) or codes[0]


if __name__ == "__main__":
    sys.exit(main())
