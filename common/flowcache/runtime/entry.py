"""Where a model's command line enters a run: what needs no PyTorch is answered without it."""

import argparse
import os
from typing import Any

from flowcache.runtime.cli import run_command
from flowcache.runtime.config import merge_overrides_


def main_of(name: str, options: argparse.Namespace, *, schema: Any) -> int:
    """Do what the command line of a model asks for; return the exit code.

    Args:
        name: of the model's package.
        options: as `run_parser` gives them.
        schema: dataclass of all settings.
    """
    if "RANK" not in os.environ:  # of several processes one reports, once they have met
        exit_code = run_command(lambda: merge_overrides_({}, schema, options.settings))
        if exit_code:
            return exit_code
    from flowcache.runtime.model import load_model
    from flowcache.runtime.parallel import run_in_ranks
    from flowcache.runtime.run import execute, list_settings, request_of

    model = load_model(name)
    request = request_of(options, model.keys)
    if options.list_settings:
        return run_command(lambda: list_settings(model, request))
    return run_in_ranks(lambda ranks: execute(model, request, ranks))
