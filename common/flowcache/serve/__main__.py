"""The command line of the service: `python -m flowcache.serve`."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

from flowcache.errors import UserError
from flowcache.runtime.cli import Parser, run_command
from flowcache.runtime.cluster import check_replicas

if TYPE_CHECKING:
    from flowcache.serve.jobs import Jobs

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXAMPLES = """examples:
  python -m flowcache.serve --model demo
  python -m flowcache.serve --model Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers \\
      --preset flowcache_fast num_frames=97
  python -m flowcache.serve --model demo --ray --replicas 2
  python -m flowcache.serve --model demo --ray --gpus-per-replica 2
  curl http://127.0.0.1:8000/v1/videos -H 'content-type: application/json' \\
      -d '{"prompt": "a red circle moving right on a black background"}'

The page is at http://HOST:PORT/, the description of the HTTP interface at /docs.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (2: something given is wrong)."""
    parser = Parser(
        prog="python -m flowcache.serve",
        description="Keep a model loaded and make videos for HTTP clients and on a live page.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="auto", help="as in the model's own command line")
    parser.add_argument("--architecture", help="package of the model (default: by its name)")
    parser.add_argument("--preset", default="flowcache_fast", help="where a client names none")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token", help="what clients must send as a bearer token")
    parser.add_argument(
        "--folder", type=Path, default=Path("result/serve"), help="where videos are kept"
    )
    parser.add_argument("--queue", type=int, default=64, help="videos that wait at most")
    parser.add_argument("--disk-gb", type=float, default=20.0, help="space for kept videos")
    parser.add_argument("--upload-mb", type=float, default=100.0, help="of one request at most")
    parser.add_argument(
        "--ray", action="store_true", help="replicas of the model by Ray, an optional package"
    )
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="at most (default: one per GPU of the cluster; on CPUs 1)",
    )
    parser.add_argument(
        "--gpus-per-replica",
        type=int,
        metavar="K",
        help="of one machine, which make each video together (default: 1; on CPUs processes)",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of all videos")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: serve(options))


def serve(options: argparse.Namespace) -> None:
    """Load the model, and answer until the process is ended."""
    if not 0 < options.port < 65536:
        raise UserError(f"--port must be between 1 and 65535, not {options.port}")
    for name in ("queue", "disk_gb", "upload_mb"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")
    pairs = [text.partition("=") for text in options.settings]
    if not all(equals for _, equals, _ in pairs):
        raise UserError("settings are given as key=value, as in num_frames=97")
    group_size: int | None = options.gpus_per_replica
    check_replicas(options.replicas, is_wanted=options.ray, group_size=group_size)
    try:
        import uvicorn

        from flowcache.serve.app import make_app
        from flowcache.serve.page import mount_page
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'flowcache[serve]', or in the repository "
            "pip install -e '.[serve]'"
        ) from None
    given = {
        "model": options.model,
        "preset": options.preset,
        "architecture": options.architecture,
        "progress_bar": False,
        **{key: value for key, _, value in pairs},
    }
    with ExitStack() as stack:
        jobs = start_jobs(options, given, stack)
        stack.callback(jobs.close)
        max_upload_bytes = int(options.upload_mb * 1e6)
        app = make_app(
            jobs,
            max_upload_bytes=max_upload_bytes,
            token=options.token,
            is_local=options.host in LOOPBACK,
        )
        sys.stderr.write(f"page and service at http://{options.host}:{options.port}/\n")
        mount_page(app, jobs, max_upload_bytes=max_upload_bytes)
        uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


def start_jobs(options: argparse.Namespace, given: dict[str, Any], stack: ExitStack) -> "Jobs":
    """Load the model, here or in replicas that end with the stack, and start the queue."""
    from flowcache.api import load, unloaded
    from flowcache.serve.jobs import Jobs

    limits: dict[str, Any] = {"max_waiting": options.queue, "max_bytes": int(options.disk_gb * 1e9)}
    if not options.ray:
        return Jobs(load(**given), options.folder, **limits)
    from flowcache.runtime.ending import Place
    from flowcache.runtime.parallel import Ranks
    from flowcache.serve.group import load_in
    from flowcache.serve.replicas import replicas

    size = options.gpus_per_replica or 1
    pipe = unloaded(**given, ranks=Ranks(Place(size=size)))
    pipe.plan()  # what is wrong with the settings is known before anything starts
    found = replicas(partial(load_in, given=given), options.replicas, group_size=size)
    made = stack.enter_context(found)
    return Jobs(pipe, options.folder, make=made.make, num_at_once=made.num_replicas, **limits)


if __name__ == "__main__":
    sys.exit(main())
