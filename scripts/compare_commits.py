#!/usr/bin/env python
"""Run the presets of two commits on this machine and compare what they make, bit for bit.

    python scripts/compare_commits.py main --quick                    # one preset per model
    python scripts/compare_commits.py main~5                          # every preset of every demo
    python scripts/compare_commits.py v1 v2 --kinds serial --models magi1
    python scripts/compare_commits.py main --presets flowcache_fast stride --kinds 2 compiled

Every preset makes a short video of the demo checkpoint with each commit: two segments of
SkyReels-V2, four chunks of MAGI-1; in one process, in two and four, and with compiled blocks. Equal
must be: the latents that the VAE decoder takes, the pixels it returns (both in float, by SHA-256),
every decision and the rest of the record and report but times and environment. A setting that both
commits refuse in the same words is equal, too; a preset of one commit alone is a difference. Bits
differ between kinds of processors, so nothing is stored: both commits run here.

The commits may differ in where their code lies: only the models' command lines, the keys of the
JSON files and the names of weights in a checkpoint must be the same.

Exit code: 0 if all are equal, 1 if not, 2 if a commit or name is unknown.
"""

import argparse
import hashlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("flowcache", "magi1", "skyreels_v2")
PROMPT = "a red circle moving right on a black background"
SERIAL, COMPILED = "serial", "compiled"
KINDS = (SERIAL, "2", "4", COMPILED)
"""One process, several, or one with compiled blocks."""
QUICK = "flowcache_fast"
REFUSAL = "error:"
"""How the line starts with which a command refuses a setting; all else that fails is a crash."""
NO_RESULT = ("seconds", "environment", "probe", "timeline", "peak_memory")
"""Words in the keys of what two equal runs may differ in."""
TIMEOUT_SECONDS = 900
SUFFIXES = (".json", ".record.json")


@dataclass(frozen=True)
class Model:
    """How a model's demo is run, and between which weights of its VAE latents become pixels."""

    folder: str
    settings: tuple[str, ...]
    vae: str
    latents: str
    """Weight of the first layer that sees latents."""
    pixels: str
    """Weight of the layer that returns pixels."""
    checkpoints: tuple[str, ...]


MODELS = {
    "skyreels_v2": Model(
        folder="FlowCache4SkyReels-V2",
        settings=("num_frames=57", "base_num_frames=37", "overlap_history=17", "num_steps=12"),
        vae="demo/vae/diffusion_pytorch_model.safetensors",
        latents="post_quant_conv.weight",
        pixels="decoder.conv_out.weight",
        checkpoints=("demo",),
    ),
    "magi1": Model(
        folder="FlowCache4MAGI-1",
        settings=("runtime_config.num_frames=96", "runtime_config.num_steps=16"),
        vae="demo/ckpt/vae/diffusion_pytorch_model.safetensors",
        latents="decoder.proj_in.weight",
        pixels="decoder.last_layer.weight",
        checkpoints=("demo", "demo-base"),
    ),
}


@dataclass(frozen=True)
class Case:
    """One run that both commits make."""

    model: str
    checkpoint: str
    preset: str
    kind: str

    @property
    def name(self) -> str:
        """Name of its files."""
        return "-".join((self.model, self.checkpoint, self.preset, self.kind))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--observe"]:
        observe(Path(given[1]), MODELS[given[2]], Path(given[3]), given[4:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("head", nargs="?", default="HEAD", help="commit (default: HEAD)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--presets", nargs="+", help="some presets (default: all of both commits)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, help="of processes or blocks (default: all)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"one preset ({QUICK}) and kind ({SERIAL}) with one checkpoint per model, unless "
        "--presets or --kinds name others; under a minute",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    options = parser.parse_args(given)
    presets = options.presets or ([QUICK] if options.quick else None)
    kinds = options.kinds or ([SERIAL] if options.quick else KINDS)
    with TemporaryDirectory() as folder:
        checkouts = []
        for name, commit in (("base", options.base), ("head", options.head)):
            if not extract(commit, Path(folder, name)):
                sys.stderr.write(f"error: {commit} is no commit of this repository\n")
                return 2
            checkouts.append(Path(folder, name))
        cases = find_cases(checkouts, options.models, presets, kinds, is_quick=options.quick)
        unknown = set(presets or ()) - {case.preset for case in cases}
        if unknown:
            sys.stderr.write(f"error: no preset {', '.join(sorted(unknown))} in either commit\n")
            return 2
        with ThreadPoolExecutor(options.jobs) as pool:
            found = pool.map(lambda case: compare(case, *checkouts), cases)
            different = 0
            for case, (outcome, fault) in zip(cases, found, strict=True):
                different += fault is not None
                print(f"{'equal    ' if fault is None else 'DIFFERENT'}  {case.name}  {outcome}")
                if fault is not None:
                    print(f"           {fault}")
                sys.stdout.flush()
    print(f"{len(cases)} runs of each commit: {len(cases) - different} equal")
    return 1 if different else 0


def extract(commit: str, folder: Path) -> bool:
    """Write the files of a commit; return whether there is such a commit."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(REPOSITORY), "archive", commit], capture_output=True, check=False
    )
    if archive.returncode:
        return False
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return True


def find_cases(
    checkouts: Sequence[Path],
    models: Sequence[str],
    presets: Sequence[str] | None,
    kinds: Sequence[str],
    *,
    is_quick: bool = False,
) -> list[Case]:
    """Return the runs of the presets that any of the commits has.

    Args:
        is_quick: take the first checkpoint of each model only.
    """
    cases = []
    for name in models:
        model = MODELS[name]
        known = {
            path.stem
            for checkout in checkouts
            for path in (checkout / model.folder / "configs").glob("*.yaml")
        }
        for preset in sorted(known if presets is None else known & set(presets)):
            for checkpoint in model.checkpoints[: 1 if is_quick else None]:
                cases += [Case(name, checkpoint, preset, kind) for kind in kinds]
    return cases


def compare(case: Case, base: Path, head: Path) -> tuple[str, str | None]:
    """Run both commits; return the outcome of the first one, and the first difference or None."""
    return judge(MODELS[case.model], run(case, base), run(case, head))


def judge(
    model: Model, base: dict[str, Any] | str, head: dict[str, Any] | str
) -> tuple[str, str | None]:
    """Return the outcome of the first of two results, and the first difference or None.

    A crash and a run whose latents or pixels were not seen are never equal to anything.
    """
    outcomes = describe(base), describe(head)
    if isinstance(base, str) or isinstance(head, str):
        is_refused = base == head and outcomes[0].startswith(REFUSAL)
        return outcomes[0], None if is_refused else "base: {}; head: {}".format(*outcomes)
    for name in (model.latents, model.pixels):
        if not any(name in line for line in seen_by_decoder(base)):
            return outcomes[0], f"nothing was seen at the layer of {name}"
    return outcomes[0], first_difference(base, head)


def seen_by_decoder(result: dict[str, Any]) -> list[str]:
    """Return the lines of all processes, one per tensor."""
    return [line for text in result["decoded"].values() for line in text.splitlines()]


def describe(result: dict[str, Any] | str) -> str:
    """Return a run's outcome in words."""
    if isinstance(result, str):
        return result
    count = len(seen_by_decoder(result))
    return f"{result['.json']['num_frames']} frames, {count} tensors at the VAE decoder's ends"


def roots_of(checkout: Path) -> list[Path]:
    """Return the folders from which the packages of a commit are imported."""
    found = {
        path.parents[1]
        for package in PACKAGES
        for pattern in (f"{package}/__init__.py", f"*/{package}/__init__.py")
        for path in checkout.glob(pattern)
    }
    return sorted(found - {checkout / "tests", checkout / "scripts"})


def run(case: Case, checkout: Path) -> dict[str, Any] | str:
    """Make a video with the files of a commit; return what is compared, or its error line."""
    model = MODELS[case.model]
    out = checkout / f"{case.name}.mp4"
    digests = checkout / f"{case.name}.digests"
    is_compiled = case.kind == COMPILED
    processes = 1 if case.kind in (SERIAL, COMPILED) else int(case.kind)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}"]
    command += [__file__, "--observe", str(digests), case.model, str(checkout / model.folder)]
    command += [case.model, "--model", case.checkpoint, "--preset", case.preset]
    command += ["--prompt", PROMPT, "--out", str(out), "--record", "device=cpu", *model.settings]
    command += [f"compile={'true' if is_compiled else 'false'}", "overlap=false"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, roots_of(checkout))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            command,
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no result after {TIMEOUT_SECONDS} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        line = next((line for line in lines if line.startswith(REFUSAL)), lines[-1])
        return line.replace(f"{checkout}/", "")
    seen = {path.suffix: path.read_text() for path in checkout.glob(f"{digests.name}.*")}
    files = {
        suffix: json.loads(out.with_suffix(suffix).read_text().replace(f"{checkout}/", ""))
        for suffix in SUFFIXES
    }
    return {"decoded": seen, **files}


def first_difference(a: Any, b: Any, *, place: str = "") -> str | None:
    """Return where two JSON values differ, or None; times and environment do not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if any(word in key for word in NO_RESULT):
                continue
            if key not in a or key not in b:
                return f"{place}/{key} is only in {'base' if key in a else 'head'}"
            fault = first_difference(a[key], b[key], place=f"{place}/{key}")
            if fault is not None:
                return fault
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        faults = (
            first_difference(*pair, place=f"{place}/{i}")
            for i, pair in enumerate(zip(a, b, strict=True))
        )
        return next((fault for fault in faults if fault is not None), None)
    is_same = type(a) is type(b) and (a == b or (a != a and b != b))  # nan
    return None if is_same else f"{place}: {str(a)[:80]} and {str(b)[:80]}"


def observe(path: Path, model: Model, folder: Path, arguments: Sequence[str]) -> None:
    """Run a package's command line, and write the digests of what its VAE decoder saw.

    Layers are known by their weights, so that this holds wherever the code lies.

    Args:
        path: of the digests, to which the number of the process is added.
        folder: of the model, with its demo.
        arguments: the package, then its arguments.
    """
    import torch
    from safetensors import safe_open

    with safe_open(folder / model.vae, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in (model.latents, model.pixels)}
    names = {tuple(weight.shape): name for name, weight in weights.items()}
    hooked: set[int] = set()
    lines: list[str] = []

    def see(layer: Any, inputs: Any, output: Any) -> None:
        name = names[tuple(layer.weight.shape)]
        if bool((layer.weight == weights[name]).all()):
            seen = inputs[0] if name == model.latents else output
            digest = hashlib.sha256(seen.detach().contiguous().numpy().tobytes())
            lines.append(f"{name} {list(seen.shape)} {digest.hexdigest()}")

    def follow(layer: Any, name: str, weight: Any) -> None:
        # a hook on every module would keep blocks from being compiled
        is_like = weight is not None and tuple(weight.shape) in names
        if name == "weight" and is_like and id(layer) not in hooked:
            hooked.add(id(layer))
            layer.register_forward_hook(see)

    torch.nn.modules.module.register_module_parameter_registration_hook(follow)
    package, *sys.argv[1:] = arguments
    try:
        runpy.run_module(package, run_name="__main__")
    finally:
        Path(f"{path}.{os.environ.get('RANK', '0')}").write_text("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
