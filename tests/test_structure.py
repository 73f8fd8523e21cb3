"""Which file may import what, and what may lie in the repository."""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = {
    "flowcache": REPOSITORY / "common" / "flowcache",
    "magi1": REPOSITORY / "FlowCache4MAGI-1" / "magi1",
    "self_forcing": REPOSITORY / "FlowCache4Self-Forcing" / "self_forcing",
    "skyreels_v2": REPOSITORY / "FlowCache4SkyReels-V2" / "skyreels_v2",
}
# A package may import itself and these of ours.
MODELS = ("magi1", "self_forcing", "skyreels_v2")
ALLOWED = {"flowcache": set[str](), **{model: {"flowcache"} for model in MODELS}}
OURS = {*PACKAGES, "scripts", "tests"}

# The parts of a model know nothing of what puts them together.
PARTS = {"dit", "layers", "text", "vae", "window"}
ASSEMBLIES = {"__main__", "model", "pipeline", "upstream", "work"}

# Large or optional libraries, and the only files (of any package) that import them.
OWNERS = {
    "diffusers": {
        *("components.py", "demo.py", "diffusers_pipeline.py"),
        *("vae.py", "vae_layers.py", "wan_vae.py"),
    },
    "transformers": {"enhance.py", "text.py", "embeddings.py"},
    "flash_attn": {"attention.py"},
    "flash_attn_interface": {"attention.py"},
    "av": {"video.py"},
    "imageio_ffmpeg": {"video.py"},
    "imageio": {"video.py"},
}

OPTIONAL = {"flash_attn", "flash_attn_interface", "triton"}  # for CUDA only
LOCAL = [
    *(REPOSITORY / "scripts", REPOSITORY / "tests", REPOSITORY / "tests" / "scripts"),
    REPOSITORY / "tests" / "shared",
    REPOSITORY / "tests" / "released",
    REPOSITORY / "FlowCache4SkyReels-V2",
]

MAX_FILE_BYTES = 8_000_000
MAX_DEMO_BYTES = 12_000_000
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|Users|work)/")


def modules(package: str) -> dict[str, Path]:
    """Return the files of a package by module name, as in `flowcache.demo.vae`."""
    folder = PACKAGES[package]
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path
        for path in sorted(folder.rglob("*.py"))
    }


@functools.cache
def imported(path: Path, *, for_types: bool = True) -> frozenset[str]:
    """Return the full names that a file imports anywhere, `from a import b` as `a` and `a.b`.

    Args:
        for_types: also what is imported for type checkers alone.
    """
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not for_types:
        tree.body = [node for node in tree.body if not _is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: relative import"
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def repository_files() -> list[Path]:
    """Return what is, or would be, in git."""
    listing = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "-coz", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (REPOSITORY / name for name in listing.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_packages_on_a_lower_floor(package: str):
    for name, path in modules(package).items():
        higher = top_level(path) & OURS - {package} - ALLOWED[package]
        assert not higher, f"{name} imports {sorted(higher)}"


ENTRIES = {
    **dict.fromkeys(("__init__", "api", "diffusers"), "tool"),
    **dict.fromkeys(("launch", "video"), "runtime"),
}
"""Files next to the method that are no part of it -> the floor that they are on."""
FLOORS = {
    "method": set[str](),
    "runtime": {"method"},
    "wan": {"method", "runtime"},
    "tool": {"method", "runtime", "wan", "tool"},
}
"""Floor of the shared package -> the floors that it may import in addition to itself."""


def floor_of(name: str) -> str:
    """Return the floor of a module of `flowcache`: `flowcache.runtime.run` is `runtime`."""
    parts = name.split(".")
    if len(parts) < 3:
        return ENTRIES.get(parts[-1], "method")
    return parts[1] if parts[1] in ("runtime", "wan") else "tool"


def test_a_floor_of_the_shared_package_imports_only_lower_floors():
    """The method can be read, and used, without anything of a run, of Wan, or of a tool."""
    files = modules("flowcache")
    for name, path in files.items():
        own = floor_of(name)
        found = {floor_of(other) for other in imported(path) & files.keys() if other != "flowcache"}
        assert found <= FLOORS[own] | {own}, f"{name} is of the {own} and imports {sorted(found)}"


def test_no_tool_of_the_shared_package_knows_a_model_by_name():
    for name, path in modules("flowcache").items():
        assert not imported(path) & {*MODELS}, name
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if floor_of(name) in ("method", "wan"):
            texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert not texts & {*MODELS}, name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_around_a_corner(package: str):
    files = modules(package)
    graph = {
        name: (imported(path, for_types=False) & files.keys()) - {name}
        for name, path in files.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


@pytest.mark.parametrize("package", MODELS)
def test_the_parts_of_a_model_do_not_import_what_assembles_them(package: str):
    forbidden = {f"{package}.{name}" for name in ASSEMBLIES}
    for name, path in modules(package).items():
        if path.stem in PARTS:
            assert not imported(path) & forbidden, name


FUNCTIONS_OF_BOTH = {"main": "the entry point of a command line: the model's, and upstream's"}
"""Top-level function of both models -> why it isn't one function, or a method of the contract."""
MAX_NAMES_OF_BOTH = 20
"""What the contract asks of each (`MODEL`, `WORDS`, `RECIPE`), settings, places of files."""


def top_level_names(package: str) -> tuple[set[str], set[str]]:
    """Return the names that a package's modules define: all, and those of functions."""
    names, functions = set[str](), set[str]()
    for path in modules(package).values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                functions.add(node.name)
            elif isinstance(node, ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {each.id for each in targets if isinstance(each, ast.Name)}
    return names | functions, functions


def test_two_models_say_few_things_under_the_same_name():
    """What both do is written once in the runtime, or is a method that the contract names."""
    (names, functions), (others, other_functions) = map(top_level_names, ("magi1", "skyreels_v2"))
    assert functions & other_functions == FUNCTIONS_OF_BOTH.keys()
    public = {name for name in names & others if not name.startswith("_")} - {"logger"}
    assert len(public) <= MAX_NAMES_OF_BOTH, sorted(public)


@pytest.mark.parametrize("library", OWNERS)
def test_a_large_library_is_imported_in_few_files_only(library: str):
    for package in PACKAGES:
        for name, path in modules(package).items():
            if path.name not in OWNERS[library]:
                assert library not in top_level(path), f"{name} imports {library}"


def declared(*, with_extras: bool) -> set[str]:
    """Return the distributions that pyproject.toml names, by the installed metadata."""
    lines = importlib.metadata.requires("flowcache") or []
    wanted = [line for line in lines if with_extras or "extra ==" not in line]
    return {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in wanted}


@functools.cache
def installed() -> dict[str, set[str]]:
    """Return the distributions that hold each importable name.

    By their files: Python 3.10's `packages_distributions` reads only `top_level.txt`, which many
    wheels have no more.
    """
    found: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or []:
            if file.suffix in {".py", ".so", ".pyi"}:
                name = file.parts[0].partition(".")[0]
                found.setdefault(name, set()).add(distribution.name)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("folder", "with_extras"),
    [
        *((path, False) for path in PACKAGES.values()),
        *((folder, True) for folder in (PACKAGES["flowcache"] / "serve", REPOSITORY / "tests")),
    ],
)
def test_every_imported_library_is_a_declared_dependency(folder: Path, with_extras: bool):
    distributions = installed()
    declared_names = declared(with_extras=with_extras)
    for path in sorted(folder.rglob("*.py")):
        if not with_extras and path.parent.name == "serve":
            continue  # only with the extra of that name
        for name in top_level(path) - OURS - sys.stdlib_module_names - OPTIONAL:
            if name in distributions:
                found = {normal(distribution) for distribution in distributions[name]}
                assert found & declared_names, f"{path.name} imports {name}: not in pyproject.toml"
            else:
                is_local = any(
                    (root / f"{name}.py").exists() or (root / name).is_dir() for root in LOCAL
                )
                assert is_local, f"{path.name} imports {name}, which is not installed"


def test_what_compares_in_ulps_is_marked_to_run_with_other_vector_widths():
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "closeness" in imported(path) and path.stem != "test_closeness":
            assert "pytest.mark.numeric" in text, path.name


def test_no_file_names_a_folder_of_somebodys_machine():
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights, images, videos
        found = MACHINE_PATH.search(text)
        if path != Path(__file__):
            assert found is None, f"{path.relative_to(REPOSITORY)} holds {found}"


def test_files_are_small_enough_for_git():
    sizes = {path.relative_to(REPOSITORY): path.stat().st_size for path in repository_files()}
    too_large = {str(path): size for path, size in sizes.items() if size > MAX_FILE_BYTES}
    assert not too_large
    for folder in ("FlowCache4SkyReels-V2/demo", "FlowCache4MAGI-1/demo"):
        total = sum(size for path, size in sizes.items() if path.is_relative_to(folder))
        assert total <= MAX_DEMO_BYTES, f"{folder} holds {total} bytes"
