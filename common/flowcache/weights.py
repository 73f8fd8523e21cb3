"""Read weight files and load them strictly into a module that was built on the meta device.

Tensors are mapped from disk, never read as a whole: a header check costs milliseconds, and loading
holds one tensor more than the module itself.
"""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowcache.errors import UserError

logger = logging.getLogger(__name__)

_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD_OF = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_LFS_POINTER = b"version https://git-lfs"
_MISFIT = "the file does not fit the model config"


class StoredTensor(NamedTuple):
    """A tensor as a file holds it: the file, the key in the file, the (lazily mapped) values."""

    path: Path
    key: str
    tensor: Tensor


def take_whole(tensor: Tensor) -> Tensor:
    """Return the stored tensor itself."""
    return tensor


@dataclass(frozen=True)
class Origin:
    """Where one parameter of a module comes from.

    Attributes:
        key: key in the file; several parameters may share one.
        take: what to take of the stored tensor, e.g. a third of a joint projection.
    """

    key: str
    take: Callable[[Tensor], Tensor] = take_whole


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply (regular expression, replacement) rules to a name, one after the other.

    Example: `norm3.weight` under `("^norm3", "norm2")` becomes `norm2.weight`.
    """
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def ignore_none(_key: str) -> bool:
    """Refuse to ignore any key of a file."""
    return False


def find_shards(folder: str | Path) -> tuple[Path, ...]:
    """List the safetensors files that make up one checkpoint.

    An index (`*.safetensors.index.json`) names them; without one it is every `*.safetensors` of
    the folder, and files called `NAME-00002-of-00006.safetensors` must be there in full number.

    Raises:
        UserError: if the folder, a file the index or the numbering calls for, or any file at all
            is missing, or if the index is not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it must hold the *.safetensors weights")
    indexes = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if len(indexes) == 1:
        shards = sorted(set(_read_index(indexes[0]).values()))
        paths = tuple(folder / name for name in shards)
        origin = indexes[0].name
    else:
        paths = tuple(sorted(folder.glob("*.safetensors")))
        paths = _complete_numbering(paths)
        origin = "the numbering of its neighbours"
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {origin} calls for it; download it again")
    if not paths:
        raise UserError(f"{folder}: holds no *.safetensors file; is the download complete?")
    return paths


def _read_index(path: Path) -> dict[str, str]:
    """Read the map from key to file name of an index.

    Raises:
        UserError: if it is not JSON with a `weight_map` from text to text.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.debug("unreadable index %s", path, exc_info=True)
    raise UserError(
        f"{path}: not a readable safetensors index with a weight_map; download it again"
    )


def _complete_numbering(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Add the files that the numbering of the given ones calls for, in order."""
    complete = set(paths)
    for path in paths:
        if matched := _SHARD_OF.fullmatch(path.name):
            stem, digits, total = matched["stem"], len(matched["number"]), matched["total"]
            complete |= {
                path.with_name(f"{stem}-{number:0{digits}d}-of-{total}.safetensors")
                for number in range(1, int(total) + 1)
            }
    return tuple(sorted(complete))


def read(paths: Iterable[str | Path]) -> Iterator[StoredTensor]:
    """Yield every tensor of `.safetensors` and `.pth` files, one file after the other.

    The tensors are mapped from disk: looking at shape and dtype reads no data. Copy what is to
    outlive the file. (A `.pth` of the format before PyTorch 1.6 cannot be mapped and is read.)

    Raises:
        UserError: if a file is missing, cut short, corrupt, or no set of named tensors.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if path.suffix == ".safetensors":
            yield from _read_safetensors(path)
        else:
            yield from _read_pickle(path)


def _read_safetensors(path: Path) -> Iterator[StoredTensor]:
    try:
        # opening parses the header and compares the size it announces with the file's
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield StoredTensor(path, key, file.get_tensor(key))
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    except RuntimeError as error:  # torch's, when the system refuses to map the file
        raise UserError(f"{path}: {_first_line(error)}; free some memory") from error


def _read_pickle(path: Path) -> Iterator[StoredTensor]:
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (
        RuntimeError,
        pickle.UnpicklingError,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise _unreadable(path, error) from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a map of named tensors")
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise UserError(f"{path}: key {key} holds a {kind}, expected a tensor")
        yield StoredTensor(path, key, tensor)


def _unreadable(path: Path, error: Exception) -> UserError:
    """Say in one line why a weight file cannot be read, and what to do."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return UserError(f"{path}: is a Git LFS pointer, not the weights; run git lfs pull")
    return UserError(f"{path}: cut short or corrupt ({_first_line(error)}); download it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@dataclass(frozen=True)
class _Target:
    """A parameter or buffer that wants values."""

    names: tuple[str, ...]
    name: str
    shape: torch.Size
    is_floating: bool
    take: Callable[[Tensor], Tensor]


def _targets_by_key(module: nn.Module, origin: Callable[[str], Origin]) -> dict[str, list[_Target]]:
    """Map each key wanted of the files to what it fills; tied parameters list all their names."""
    state = module.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = {}
    for name, value in state.items():
        names_of.setdefault(id(value), []).append(name)
    targets: dict[str, list[_Target]] = {}
    for name, value in state.items():
        source = origin(name)
        target = _Target(
            names=tuple(names_of[id(value)]),
            name=name,
            shape=value.shape,
            is_floating=value.is_floating_point(),
            take=source.take,
        )
        targets.setdefault(source.key, []).append(target)
    return targets


def match(
    module: nn.Module,
    tensors: Iterable[StoredTensor],
    *,
    origin: Callable[[str], Origin] = Origin,
    ignored: Callable[[str], bool] = ignore_none,
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield (names in the module, values) for each stored tensor; every name exactly once.

    Tied parameters have several names and need one stored tensor; when each name has its own in
    the file, they must be equal (only then the values are looked at).

    Args:
        module: on any device; only names, shapes and kinds are read.
        tensors: what the files hold.
        origin: for a name in the module, where its values come from.
        ignored: for a key of a file, whether it may be left out.

    Raises:
        UserError: naming file and key, if a key is unexpected, missing or there twice, or if a
            tensor has another shape or kind of dtype than the module's.
    """
    targets = _targets_by_key(module, origin)
    first_path: dict[str, Path] = {}
    filled: set[tuple[str, ...]] = set()
    tied: dict[tuple[str, ...], Tensor] = {}
    paths: list[Path] = []
    for path, key, tensor in tensors:
        if path not in paths:
            paths.append(path)
        if ignored(key):
            continue
        if key in first_path:
            raise UserError(f"{path}: key {key} is also in {first_path[key]}; remove one of them")
        if key not in targets:
            raise UserError(f"{path}: key {key} is unexpected; {_MISFIT}")
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


def _take(target: _Target, path: Path, key: str, tensor: Tensor) -> Tensor:
    """Take a target's part of a stored tensor and check its shape and kind."""
    try:
        part = target.take(tensor)
        fits = part.shape == target.shape
    except (RuntimeError, IndexError):
        part, fits = tensor, False
    if not fits:
        use = "" if target.name == key else f" for {target.name}"
        expected = f"expected {list(target.shape)}{use}"
        raise UserError(f"{path}: key {key} has shape {list(tensor.shape)}, {expected}; {_MISFIT}")
    if part.is_floating_point() != target.is_floating:
        kind = "a floating" if target.is_floating else "an integer"
        raise UserError(
            f"{path}: key {key} has dtype {part.dtype}, expected {kind} type; {_MISFIT}"
        )
    return part


def load_into(
    module: nn.Module,
    tensors: Iterable[StoredTensor],
    *,
    origin: Callable[[str], Origin] = Origin,
    ignored: Callable[[str], bool] = ignore_none,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Give every parameter and persistent buffer of a module its values, for inference.

    Tensors are copied, converted and let go one by one. The module ends in evaluation mode, its
    parameters ask for no gradient.

    Args:
        module: usually built on the meta device.
        tensors: from `read`.
        origin: see `match`.
        ignored: see `match`.
        dtype: type of the floating tensors; None keeps each as stored.
        device: where the values go.

    Raises:
        UserError: see `match`.
    """
    with torch.no_grad():
        for names, part in match(module, tensors, origin=origin, ignored=ignored):
            wanted = dtype if part.is_floating_point() else None
            # copied always: a view of the mapped file would change or crash with the file
            value = part.to(
                device=device,
                dtype=wanted or part.dtype,
                copy=True,
                memory_format=torch.contiguous_format,
            )
            _assign(module, names, value)
    module.eval()


def _assign(module: nn.Module, names: Iterable[str], value: Tensor) -> None:
    """Put a value at each of the given (tied) names of a module."""
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        is_parameter = leaf in dict(owner.named_parameters(recurse=False))
        setattr(owner, leaf, parameter if is_parameter else value)


def check_files(
    module: nn.Module,
    paths: Iterable[str | Path],
    *,
    origin: Callable[[str], Origin] = Origin,
    ignored: Callable[[str], bool] = ignore_none,
) -> int:
    """Check from their headers alone that files fill a module exactly.

    Returns:
        Size of the tensors that fill the module, in bytes as stored.

    Raises:
        UserError: see `read` and `match`.
    """
    matched = match(module, read(paths), origin=origin, ignored=ignored)
    return sum(part.numel() * part.element_size() for _, part in matched)


def load_files(
    module: nn.Module,
    paths: Iterable[str | Path],
    *,
    origin: Callable[[str], Origin] = Origin,
    ignored: Callable[[str], bool] = ignore_none,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Load files into a module built on the meta device, after a check of all their headers.

    Raises:
        UserError: see `read` and `match`; before any data are read.
    """
    paths = tuple(paths)
    check_files(module, paths, origin=origin, ignored=ignored)
    load_into(module, read(paths), origin=origin, ignored=ignored, dtype=dtype, device=device)
