#!/usr/bin/env python
"""Make a table from the videos of a protocol, or check one that was made before.

The videos come from `scripts/sample.py --protocol`; reproduce_skyreels_v2.sh and
reproduce_magi1.sh do both. Written are table.json (everything), table.csv and table.md.

--verify reads every video and receipt again, compares all videos anew, and says what contradicts
the stored table: SHA-256 of videos, receipts and protocol, and every figure but times: to the last
digit on a machine of the kind on which the table was computed, PSNR, SSIM and LPIPS within a
rounding elsewhere. The table's own environment says which it was.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.bench.protocol import VIDEOS, keep_protocol, read_protocol
from flowcache.bench.table import (
    JSON_FILE,
    TOLERANCES,
    Judge,
    gaps,
    is_same_machine,
    markdown,
    read_report,
    verify,
    write_table,
)
from flowcache.errors import UserError
from flowcache.report.comparison import make_network
from flowcache.runtime.cli import Parser, choose_device, run_command
from flowcache.runtime.metrics import METRICS

EXIT_CONTRADICTION = 1

# in our own words: those of make_network name folders of this machine
NO_LPIPS = (
    "LPIPS is empty: the weights of AlexNet were not there; scripts/compare.py --help says where "
    "they are looked for"
)
OTHER_BACKBONE = (
    "LPIPS is not comparable with published values: its backbone is not the released AlexNet"
)

EXACT = "all but times to the last digit"
WITHIN = (
    f"PSNR within {TOLERANCES['psnr']:g} dB, SSIM within {TOLERANCES['ssim']:g}: the table was "
    "computed on a machine of another kind, or with another torch"
)

EXAMPLES = """examples:
  bash scripts/reproduce_skyreels_v2.sh
  bash scripts/reproduce_magi1.sh
  NUM_PROMPTS=1 OUT=result/short bash scripts/reproduce_skyreels_v2.sh
  python scripts/reproduce.py --protocol scripts/protocols/skyreels_v2_demo.yaml --out result/table
  python scripts/reproduce.py --verify result/table

Exit code: 0; 1 if --verify finds a contradiction; 2 if something given is wrong or missing.
"""


def make_judge(
    metrics: Sequence[str], weights: Path | None, *, device: str
) -> tuple[Judge, list[str]]:
    """Return what compares videos, and what people should know about it."""
    place = choose_device(device)
    network = make_network(metrics, weights, device=place)
    has_lpips = network.network is not None
    usable = tuple(metric for metric in metrics if metric != "lpips" or has_lpips)
    judge = Judge(usable, network.network, network.digests, place)
    if has_lpips or "lpips" not in metrics:
        return judge, [OTHER_BACKBONE] if network.note else []
    return judge, [NO_LPIPS]


def execute(options: argparse.Namespace) -> int:
    """Write a table or check one; return the exit code."""
    if options.verify is not None:
        return check(options.verify, options.lpips_weights, device=options.device)
    if options.protocol is None or options.out is None:
        raise UserError("give --protocol and --out, or --verify (--help shows examples)")
    protocol = read_protocol(options.protocol)
    keep_protocol(options.protocol, options.out)
    judge, notes = make_judge(METRICS, options.lpips_weights, device=options.device)
    report = write_table(
        protocol,
        options.out,
        judge=judge,
        notes=notes,
        model=options.model,
        num_prompts=options.num_prompts,
    )
    print(markdown(report))
    return 0


def check(out: Path, weights: Path | None, *, device: str) -> int:
    """Verify a result folder; return the exit code."""
    report = read_report(out)
    found, how = [f"{out / JSON_FILE}: {gap}" for gap in gaps(report)], ""
    if not found:
        judge, _ = make_judge(report["metrics"], weights, device=device)
        if judge.digests != report["lpips_sha256"]:
            raise UserError("LPIPS was computed with other weights: give those by --lpips-weights")
        found = verify(out, report, judge=judge)
        how = EXACT if is_same_machine(report, judge) else WITHIN
    if not found:
        print(f"{out}: {len(report['receipts'])} videos and all figures fit their receipts, {how}")
        return 0
    for line in found:
        sys.stderr.write(f"{line}\n")
    sys.stderr.write(f"{len(found)} contradictions in {out}: start its command again\n")
    return EXIT_CONTRADICTION


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(
        prog="python scripts/reproduce.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--protocol", type=Path, metavar="FILE", help="YAML file")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"result folder with {VIDEOS}/")
    parser.add_argument("--model", help="as it was given to sample.py")
    parser.add_argument(
        "--num-prompts", type=int, metavar="N", help="as it was given to sample.py (default: all)"
    )
    parser.add_argument("--verify", type=Path, metavar="DIR", help="result folder to check")
    parser.add_argument("--device", default="auto", help="of the metrics (default: a GPU if any)")
    parser.add_argument(
        "--lpips-weights", type=Path, metavar="PATH", help="AlexNet's file, or its folder"
    )
    options = parser.parse_args(arguments)
    codes: list[int] = []
    return run_command(lambda: codes.append(execute(options))) or codes[0]


if __name__ == "__main__":
    sys.exit(main())
