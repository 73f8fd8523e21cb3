#!/usr/bin/env python
"""Count FLOPs by closed forms: the published figures, or a run of a released model.

A multiply-add counts 2. No weights are read and nothing is rendered.
"""

import argparse
import sys
from collections.abc import Sequence

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)


from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.model import Request
from flowcache.runtime.ops import attention_flops
from flowcache.runtime.run import plan_by_sizes
from flowcache.runtime.text_files import escaped, table_row
from flowcache.schedule import staggered
from magi1 import gpu as magi1
from magi1.config import read_config
from magi1.dit import published_block_flops
from magi1.released import CONFIGS
from skyreels_v2 import gpu as skyreels
from skyreels_v2.model import MODEL
from skyreels_v2.released import RELEASED

EXAMPLES = f"""examples:
  python scripts/flops.py --paper
  python scripts/flops.py df-1.3b-540p --preset flowcache_slow
  python scripts/flops.py df-14b-540p --preset vanilla num_frames=97 base_num_frames=97

Models of SkyReels-V2: {", ".join(RELEASED)}. A run of MAGI-1 is
planned without files by the --dry-run of its own command.
"""


def skyreels_ticks() -> int:
    """Count the ticks of both windows: 70 and 65."""
    return sum(
        len(staggered(chunks, num_steps=skyreels.NUM_STEPS, lag=skyreels.LAG))
        for chunks in skyreels.SEGMENTS
    )


def magi1_rows() -> list[tuple[str, str, str]]:
    """Return quantities, what is counted, and what was published, rounded as printed there."""
    sizes = read_config(CONFIGS / f"{magi1.RELEASED_NAME}.json").model_config
    tokens, windows = magi1.CHUNK_TOKENS, magi1.WINDOWS
    alone = published_block_flops(sizes, queries=tokens, keys=0)
    seen = sizes.num_layers * attention_flops(tokens, keys=tokens, width=sizes.hidden_size)
    window = f"KV window {list(windows)}, nearly-clean pass"
    whole, reduced = (magi1.clip_flops(nearly_clean_pass=passes) for passes in (True, False))
    windowed, before_reuse = (
        magi1.clip_flops(reaches=windows, nearly_clean_pass=passes) for passes in (True, False)
    )
    shorter = magi1.clip_flops(num_frames=168, reaches=windows, nearly_clean_pass=True)
    return [
        ("a chunk's forward, without its attention", tera(alone), ""),
        ("its attention, per chunk that it sees", tera(seen), ""),
        ("240 frames, all chunks seen, nearly-clean pass (Vanilla)", peta(whole), "306 PF"),
        ("... without the nearly-clean pass", peta(reduced), ""),
        (f"240 frames, {window}", peta(windowed), ""),
        ("... without it: before any step is reused", peta(before_reuse), ""),
        (f"168 frames, {window} (MotionCache's Vanilla)", peta(shorter), "139 PF"),
    ]


def skyreels_rows() -> list[tuple[str, str, str]]:
    """Return quantities, what is counted, and what was published, rounded as printed there."""
    forward, full = skyreels.causal_flops(5), skyreels.full_flops()
    num_forwards = skyreels.NUM_BRANCHES * skyreels_ticks()
    vanilla = f"177 frames, {num_forwards} causal forwards (Vanilla)"
    return [
        ("a window's forward, counted causally", tera(forward), ""),
        ("a window's forward, full attention as it runs", tera(full), ""),
        (vanilla, peta(forward * num_forwards), "113 PF"),
        ("... with full attention as it runs", peta(full * num_forwards), ""),
        ("active chunks only, causal, before any reuse", peta(skyreels.active_only_flops()), ""),
    ]


def tera(flops: int) -> str:
    """Write a count in TFLOPs."""
    return f"{flops / 1e12:.2f} TF"


def peta(flops: int) -> str:
    """Write a count in PFLOPs."""
    return f"{flops / 1e15:.1f} PF"


def paper_table() -> str:
    """Return the published figures and what they are made of as a Markdown table."""
    lines = ["| model | what is counted | counted | published |", "|---|---|---:|---:|"]
    models = {"MAGI-1 4.5B": magi1_rows(), "SkyReels-V2 1.3B": skyreels_rows()}
    for model, rows in models.items():
        for quantity, counted, published in rows:
            lines.append(table_row([escaped(model), escaped(quantity), counted, published]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = Parser(
        prog="python scripts/flops.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="a released model of SkyReels-V2")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--preset", default="vanilla", help="name or YAML file (default: vanilla)")
    parser.add_argument(
        "--paper", action="store_true", help="print the published figures and their parts"
    )
    options = parser.parse_intermixed_args(arguments)

    def command() -> None:
        if options.paper == (options.model is not None):
            raise UserError("give either --paper or a model (--help shows examples)")
        if options.paper:
            print(paper_table())
        elif options.model in RELEASED:
            settings = ["prompt=-", *options.settings]
            print(plan_by_sizes(MODEL, Request(options.preset, options.model, settings)))
        else:
            raise UserError(
                f"{options.model} is no released model of SkyReels-V2: use one of "
                f"{', '.join(RELEASED)}"
            )

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
