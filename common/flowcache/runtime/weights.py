"""Read weight files and load them strictly into a module that was built on the meta device.

Tensors are mapped from disk, never read as a whole: a header check costs milliseconds, and loading
holds one tensor more than the module itself.
"""

import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowcache.errors import UserError, first_line
from flowcache.runtime.files import read_json

logger = logging.getLogger(__name__)

MAX_LAYERS = 1000
"""Layers of a model, and entries of a list in its config; released models have 48 at most."""
MAX_SIZE = 1_000_000
"""Any other number of a config: widths, words, pixels; released models have 256384 at most."""

_SAFETENSORS, _BIN, _INDEX = ".safetensors", ".bin", ".index.json"
_OTHER_WEIGHTS = (".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".zst")
# libraries put the name of a variant, as fp16, before or after the number
_SHARD_OF = re.compile(r"^(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<variant>(\.[^.]+)?)$")
_WRAPPERS = ("module.", "model.", "diffusion_model.", "_orig_mod.")
"""What training and other programs put before all keys of a model."""
WITHIN = ("state_dict",)
"""Entries of a pickled map in which training programs save the tensors."""
_INFIXES = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
"""What sharded training, checkpointing and compiling put anywhere into keys."""
_SCALES = ("scale_weight", "scale_input", "weight_scale", "input_scale", "scaled_fp8")
"""Ends of the keys of 8-bit weights that must be multiplied by a scale."""
_PICKLE_ERRORS = (
    *(RuntimeError, pickle.UnpicklingError, OSError, EOFError),
    *(ValueError, LookupError, TypeError, AttributeError),
    *(zipfile.BadZipFile, struct.error),  # while asking whether the file is a zip archive
)
_LFS_POINTER = b"version https://git-lfs"
_MISFIT = "the file does not fit the model config"


class StoredTensor(NamedTuple):
    """A tensor as a file holds it: the file, the key in the file, the (lazily mapped) values."""

    path: Path
    key: str
    tensor: Tensor


@dataclass(frozen=True)
class Origin:
    """Where one parameter of a module comes from."""

    key: str
    """In the file; several parameters may share one."""
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """What to take of the stored tensor, e.g. a third of a joint projection."""


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply (regular expression, replacement) rules to a name, one after the other.

    Example: `norm3.weight` under `("^norm3", "norm2")` becomes `norm2.weight`.
    """
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# Finding files ------------------------------------------------------------------------------------


def find_shards(folder: str | Path, *, packing: str = "") -> tuple[Path, ...]:
    """List the files that make up one checkpoint: safetensors, or else pickled `.bin` files.

    An index (`*.safetensors.index.json`) names them; without one it is every such file of the
    folder, and files called `NAME-00002-of-00006.safetensors` must be there in full number.
    `NAME.VARIANT.safetensors` is left out where `NAME.safetensors` is there: a copy in another
    type. Hidden files are none of them: macOS leaves `._NAME` next to `NAME` on foreign disks.

    Args:
        packing: suffix of compressed files, as `.zst`; one is listed where the file itself is not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold the *.safetensors weights")
    try:
        found = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
    names = {name.removesuffix(packing) for name in found}
    for suffix in (_SAFETENSORS, _BIN):
        indexes = [name for name in names if name.endswith(suffix + _INDEX)]
        if len(indexes) == 1:
            index = folder / indexes[0]
            shards = sorted(set(_read_index(index).values()))
            return tuple(_stored(folder / name, packing, index.name) for name in shards)
        if kept := _without_variants([name for name in names if name.endswith(suffix)], suffix):
            _check_numbers(kept, suffix, folder)
            return tuple(_stored(folder / name, packing, "its name") for name in sorted(kept))
    others = [name for name in sorted(names) if name.endswith(_OTHER_WEIGHTS)]
    hint = f"{others[0]} is not read" if others else "is the download complete?"
    raise UserError(f"{folder}: holds no *.safetensors file; {hint}")


def _stored(path: Path, packing: str, origin: str) -> Path:
    """Return the file itself, or else the packed one."""
    packed = path.with_name(path.name + packing)
    for candidate in (path, packed):
        if candidate.is_file():
            return candidate
    alternative = f", nor with {packing}" if packing else ""
    raise UserError(
        f"{path}: no such file{alternative}, but {origin} calls for it; download it again"
    )


def _read_index(path: Path) -> dict[str, str]:
    """Read the map from key to file name of an index, which may name files of its folder only."""
    content = read_json(path, advice="download it again")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise UserError(
            f"{path}: not a readable index of weights with a weight_map; download it again"
        )
    for name in set(weight_map.values()):
        if name in ("", ".", "..") or re.search(r"[/\\]", name) or not name.isprintable():
            raise UserError(
                f"{path}: names the file {name[:80]!r}, but an index may only name files of its "
                "own folder; download it again"
            )
    return weight_map


def _without_variants(names: Sequence[str], suffix: str) -> list[str]:
    """Leave out the copies in another type: `NAME.fp16.safetensors` next to `NAME.safetensors`."""
    # without suffix and number of the shard: NAME, NAME.fp16
    stems = {
        name: _SHARD_OF.sub(r"\g<stem>\g<variant>", name.removesuffix(suffix)) for name in names
    }
    plain = set(stems.values())
    kept = [name for name in names if stems[name].rpartition(".")[0] not in plain]
    if len(kept) < len(names):
        spare = min(set(names) - set(kept))
        logger.info("%s is left out: a copy of %s", spare, min(kept))
    return kept


def _check_numbers(names: Sequence[str], suffix: str, folder: Path) -> None:
    """Check that all files are there that a numbered one calls for."""
    present = set(names)
    for name in names:
        if matched := _SHARD_OF.fullmatch(name.removesuffix(suffix)):
            stem, digits, total = matched["stem"], len(matched["number"]), matched["total"]
            # ends at the first missing one: the announced number may be anything
            for number in range(1, int(total) + 1):
                wanted = f"{stem}-{number:0{digits}d}-of-{total}{matched['variant']}{suffix}"
                if wanted not in present:
                    raise UserError(
                        f"{folder / wanted}: no such file, but {name} calls for it; download it "
                        "again"
                    )


def read_model_config(path: Path) -> dict[str, Any]:
    """Read the JSON that holds a model's sizes, and check that no number or list is absurd."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the checkpoint is not complete, download it again")
    content = read_json(path, advice="download it again")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    _check_sizes(path, "", content)
    return cast("dict[str, Any]", content)


def _check_sizes(path: Path, name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            _check_sizes(path, key, item)
    elif isinstance(value, list):
        items = cast("list[Any]", value)
        if len(items) > MAX_LAYERS:
            raise UserError(
                f"{path}: {name} has {len(items)} entries, at most {MAX_LAYERS} expected"
            )
        for item in items:
            _check_sizes(path, name, item)
    elif isinstance(value, int):
        limit = MAX_LAYERS if re.search("layer|depth|block", name) else MAX_SIZE
        if abs(value) > limit:
            raise UserError(f"{path}: {name} is {value:.6g}, expected at most {limit}")


# Reading files ------------------------------------------------------------------------------------


def read(paths: Iterable[str | Path], *, within: Sequence[str] = WITHIN) -> Iterator[StoredTensor]:
    """Yield every tensor of `.safetensors` and `.pth` files, one file after the other.

    The tensors are mapped from disk: looking at shape and dtype reads no data. Copy what is to
    outlive the file. (A `.pth` of the format before PyTorch 1.6 cannot be mapped and is read.)

    Args:
        within: entries of a pickled map that may hold the tensors; the first one there does.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if path.suffix != ".safetensors":
            yield from _read_pickle(path, within)
            continue
        try:
            # opening parses the header and compares the size it announces with the file's
            with safe_open(path, framework="pt", device="cpu") as file:
                keys = {key: _INFIXES.sub("", key) for key in file.keys()}  # noqa: SIM118
                wrapping = wrapping_of(keys.values())
                for key, name in keys.items():
                    yield StoredTensor(path, name.removeprefix(wrapping), file.get_tensor(key))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        except RuntimeError as error:  # torch's, when the system refuses to map the file
            reason = first_line(error).rstrip(".")
            raise UserError(f"{path}: {reason}; free some memory") from error


def _read_pickle(path: Path, within: Sequence[str]) -> Iterator[StoredTensor]:
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except _PICKLE_ERRORS as error:
        raise _unreadable(path, error) from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a map of named tensors")
    # as training programs save: next to the optimiser, or several copies
    state = next((state[key] for key in within if isinstance(state.get(key), Mapping)), state)
    keys = {key: _INFIXES.sub("", str(key)) for key in state}
    wrapping = wrapping_of(keys.values())
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise UserError(f"{path}: key {key} holds a {kind}, expected a tensor")
        yield StoredTensor(path, keys[key].removeprefix(wrapping), tensor)


def wrapping_of(keys: Iterable[str]) -> str:
    """Return what wrappers put before all keys, as `model.diffusion_model.`; else nothing."""
    keys, wrapping = list(keys), ""
    while keys:
        longer = [wrapping + part for part in _WRAPPERS]
        shared = [text for text in longer if all(key.startswith(text) for key in keys)]
        if not shared:
            break
        wrapping = shared[0]
    return wrapping


def _unreadable(path: Path, error: Exception) -> UserError:
    """Say in one line why a weight file cannot be read, and what to do."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return UserError(f"{path}: is a Git LFS pointer, not the weights; run git lfs pull")
    reason = first_line(error).rstrip(".")
    return UserError(f"{path}: cut short or corrupt ({reason}); download it again")


# Filling a module ---------------------------------------------------------------------------------


class _Target(NamedTuple):
    """A parameter or buffer that wants values, with the names of those tied to it."""

    name: str
    names: tuple[str, ...]
    value: Tensor
    take: Callable[[Tensor], Tensor]


def match(
    module: nn.Module,
    tensors: Iterable[StoredTensor],
    *,
    origin: Callable[[str], Origin] = Origin,
    ignored: Callable[[str], bool] | None = None,
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield (names in the module, values) for each stored tensor; every name exactly once.

    Tied parameters have several names and need one stored tensor; when each name has its own in
    the file, they must be equal (only then the values are looked at).

    Args:
        origin: for a name in the module, where its values come from.
        ignored: for a key of a file, whether it may be left out.
    """
    state = module.state_dict(keep_vars=True)
    tied_names: dict[int, tuple[str, ...]] = {}
    for name, value in state.items():
        tied_names[id(value)] = (*tied_names.get(id(value), ()), name)
    targets: dict[str, list[_Target]] = {}
    for name, value in state.items():
        key, take = origin(name).key, origin(name).take
        targets.setdefault(key, []).append(_Target(name, tied_names[id(value)], value, take))
    first_path: dict[str, Path] = {}
    filled: set[tuple[str, ...]] = set()
    tied: dict[tuple[str, ...], Tensor] = {}
    paths: list[Path] = []
    for path, key, tensor in tensors:
        if path not in paths:
            paths.append(path)
        if ignored is not None and ignored(key):
            continue
        if key in first_path:
            raise UserError(f"{path}: key {key} is also in {first_path[key]}; remove one of them")
        if key not in targets:
            raise UserError(f"{path}: key {key} {_why_unexpected(key, targets)}")
        first_path[key] = path
        for target in targets[key]:
            part = _take(target, path, key, tensor)
            if target.names not in filled:
                filled.add(target.names)
                yield target.names, part
            elif not torch.equal(part, tied[target.names]):
                tie = " = ".join(target.names)
                raise UserError(f"{path}: key {key} differs from the one tied to it ({tie})")
            if len(target.names) > 1:
                tied[target.names] = part
    missing = [key for key in targets if any(each.names not in filled for each in targets[key])]
    if missing:
        where = paths[0] if len(paths) == 1 else f"{len(paths)} files of {paths[0].parent}"
        count = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{where}: key {missing[0]}{count} is missing; {_MISFIT}")


def _why_unexpected(key: str, targets: Iterable[str]) -> str:
    """Say what is wrong with a key, where its name shows another form of the same model."""
    form = "give the released *.safetensors"
    if key.endswith(_SCALES):
        return f"is a scale of 8-bit weights, which are not read in this form; {form}"
    example = None
    for target in targets:
        if re.sub(r"\.\d+\.", ".", target, count=1) == key:
            return f"holds all layers in one tensor, expected one per layer, as {target}; {form}"
        example = example or target
    return f"is unexpected; {_MISFIT}, which has keys as {example}"


def _take(target: _Target, path: Path, key: str, tensor: Tensor) -> Tensor:
    """Take a target's part of a stored tensor and check its shape and kind."""
    try:
        part = target.take(tensor)
        fits = part.shape == target.value.shape
    except (RuntimeError, IndexError):
        part, fits = tensor, False
    if not fits:
        use = "" if target.name == key else f" for {target.name}"
        expected = f"expected {list(target.value.shape)}{use}"
        raise UserError(f"{path}: key {key} has shape {list(tensor.shape)}, {expected}; {_MISFIT}")
    if part.is_floating_point() != target.value.is_floating_point():
        kind = "a floating" if target.value.is_floating_point() else "an integer"
        raise UserError(
            f"{path}: key {key} has dtype {part.dtype}, expected {kind} type; {_MISFIT}"
        )
    return part


def load_into(
    module: nn.Module,
    tensors: Iterable[StoredTensor],
    *,
    origin: Callable[[str], Origin] = Origin,
    ignored: Callable[[str], bool] | None = None,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Give every parameter and persistent buffer of a module its values, for inference.

    Tensors are copied, converted and let go one by one. The module ends in evaluation mode, its
    parameters ask for no gradient.

    Args:
        dtype: type of the floating tensors; None keeps each as stored.
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    for names, part in match(module, tensors, origin=origin, ignored=ignored):
        value = part.to(
            device=device,
            dtype=dtype if part.is_floating_point() else None,
            copy=True,  # a view of the mapped file would change or crash with the file
            memory_format=torch.contiguous_format,
        )
        if names[0] in parameters:
            value = nn.Parameter(value, requires_grad=False)
        state |= dict.fromkeys(names, value)  # one object: tied parameters stay tied
    module.requires_grad_(False)
    module.load_state_dict(state, strict=True, assign=True)
    module.eval()


def check_files(
    module: nn.Module,
    paths: Iterable[str | Path],
    *,
    origin: Callable[[str], Origin] = Origin,
    ignored: Callable[[str], bool] | None = None,
    within: Sequence[str] = WITHIN,
) -> int:
    """Check from their headers alone that files fill a module exactly; return the bytes stored."""
    matched = match(module, read(paths, within=within), origin=origin, ignored=ignored)
    return sum(part.numel() * part.element_size() for _, part in matched)


def load_files(
    module: nn.Module,
    paths: Iterable[str | Path],
    *,
    origin: Callable[[str], Origin] = Origin,
    ignored: Callable[[str], bool] | None = None,
    within: Sequence[str] = WITHIN,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Load files into a module built on the meta device, after a check of all their headers."""
    paths = tuple(paths)
    check_files(module, paths, origin=origin, ignored=ignored, within=within)
    stored = read(paths, within=within)
    load_into(module, stored, origin=origin, ignored=ignored, dtype=dtype, device=device)
