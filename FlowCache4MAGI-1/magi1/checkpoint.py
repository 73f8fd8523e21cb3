"""Find an official MAGI-1 checkpoint and load its transformer, compressed shards included.

The config names three folders: one above `inference_weight*`, one above `t5-v1_1-xxl`, and the
VAE's own. Shards may be compressed (`NAME.safetensors.zst`); they are unpacked one at a time.
"""

import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch

from flowcache.bounds import given_path
from flowcache.errors import UserError
from flowcache.runtime import profile
from flowcache.runtime.embeddings import tokenizer_files
from flowcache.runtime.ending import temporary_folder
from flowcache.runtime.files import parse_json, read_json
from flowcache.runtime.hub import HUB, Hub, Missing, fetch, find_missing, local_copy
from flowcache.runtime.model import Source
from flowcache.runtime.stats import scaled
from flowcache.runtime.weights import (
    StoredTensor,
    find_shards,
    load_into,
    match,
    read,
    read_model_config,
    wrapping_of,
)
from magi1 import text, vae
from magi1.config import ReleaseConfig
from magi1.dit import DiT, set_precision
from magi1.fp8 import FP8
from magi1.released import CONFIGS, DEMOS, REAL_MODEL, RELEASED, REPOSITORY

PATH_FIELDS = ("load", "t5_pretrained", "vae_pretrained")
PACKED = ".zst"
_FRAME_HEADER_BYTES = 18
"""Most that the zstd format needs to say how large the content is."""
_MAX_HEADER_BYTES = 100 * 2**20
"""Largest header that the safetensors format allows."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": FP8,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Config = TypeVar("Config", bound=ReleaseConfig)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose parts are all there."""

    config: ReleaseConfig
    """What it is and how it is run."""
    dit_files: tuple[Path, ...]
    """Shards of the transformer, packed or not."""
    vae: Path
    """The VAE's folder."""
    text_encoder: Path
    """The T5 encoder's folder."""

    @classmethod
    def find(cls, config: ReleaseConfig) -> "Checkpoint":
        """Find the parts of the checkpoint that a config names."""
        run, engine = config.runtime_config, config.engine_config
        name = "inference_weight" + ".fp8" * engine.fp8_quant + ".distill" * engine.distill
        parts = {
            "load": Path(run.load) / name,
            "t5_pretrained": Path(run.t5_pretrained) / text.T5_FOLDER,
            "vae_pretrained": Path(run.vae_pretrained),
        }
        for field, folder in parts.items():
            if not folder.is_dir():
                raise UserError(
                    f"{folder}: no such folder, but the config's {field} asks for it: set "
                    f"runtime_config.{field}, or use --download with a released model, or --model "
                    "demo"
                )
        shards = find_shards(parts["load"], packing=PACKED)
        return cls(config, shards, parts["vae_pretrained"], parts["t5_pretrained"])

    def check_complete(self) -> None:
        """Check that no file of the text encoder, its tokenizer and the VAE is missing."""
        for folder in (self.text_encoder, self.vae):
            read_model_config(folder / "config.json")
            find_shards(folder)
        tokenizer_files(self.text_encoder)

    def check(self) -> None:
        """Check that the weights of all parts are there, whole, and fit; reads headers only."""
        check_dit(self.config, self.dit_files)
        vae.check_weights(self.vae)
        text.check_encoder(self.text_encoder, width=self.config.model_config.caption_channels)

    def fingerprint(self) -> str:
        """Return a hash of the transformer, see `profile.fingerprint`.

        Little of the files is read; packed shards are unpacked for it, one at a time.
        """
        sizes, engine = asdict(self.config.model_config), self.config.engine_config
        del sizes["params_dtype"]  # of the run, not of the weights
        # only the JSON says which steps a distilled model was made for
        sizes |= {"distill": engine.distill, "shortcut_mode": engine.shortcut_mode}
        dit = _empty_dit(self.config)
        weights = match(dit, _fitting(dit, read_shards(self.dit_files)))
        return profile.fingerprint(sizes, ((names[0], tensor) for names, tensor in weights))

    def load_dit(self, *, device: torch.device | str, dtype: torch.dtype | None = None) -> DiT:
        """Load the transformer, for inference, in the released mix of types.

        Args:
            dtype: type inside the blocks; None: the config's `params_dtype`.
        """
        check_dit(self.config, self.dit_files)
        dit = _empty_dit(self.config)
        load_into(dit, _fitting(dit, read_shards(self.dit_files)), dtype=None, device=device)
        set_precision(dit, dtype or self.config.model_config.dtype)
        return dit


def read_shards(paths: Iterable[Path]) -> Iterator[StoredTensor]:
    """Yield every tensor of the shards; a packed one is unpacked to a temporary file and mapped."""
    for path in paths:
        if path.suffix != PACKED:
            yield from read([path])
            continue
        with temporary_folder() as folder:
            unpacked = folder / path.stem
            _unpack(path, unpacked)
            for _, key, tensor in read([unpacked]):
                yield StoredTensor(path, key, tensor)


def _unpack(path: Path, target: Path) -> None:
    """Unpack a shard."""
    import zstandard  # here: whoever has no packed shards runs without it

    free = shutil.disk_usage(target.parent).free
    try:
        with path.open("rb") as packed, target.open("wb") as unpacked:
            wanted = zstandard.frame_content_size(packed.read(_FRAME_HEADER_BYTES))
            if wanted > free:
                raise UserError(
                    f"{path}: unpacks to {scaled(wanted, 'B')}, but {target.parent} has "
                    f"{scaled(free, 'B')} free: set TMPDIR to a larger disk, or unpack it once "
                    f"(zstd -d {path.name})"
                )
            packed.seek(0)
            zstandard.ZstdDecompressor().copy_stream(packed, unpacked)
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: cut short or corrupt ({error}); download it again") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be unpacked to {target.parent} ({error.strerror}): set TMPDIR to "
            "another folder"
        ) from error


def read_headers(paths: Iterable[Path]) -> Iterator[StoredTensor]:
    """Yield the names, shapes and types of the shards' tensors, the values of packed ones left out.

    Of a packed shard only the first part is unpacked; its tensors are on the meta device.
    """
    for path in paths:
        if path.suffix != PACKED:
            yield from read([path])
            continue
        header = _packed_header(path)
        wrapping = wrapping_of(header)
        for key, entry in header.items():
            try:
                dtype = _DTYPES[entry["dtype"]]
                empty = torch.empty(entry["shape"], dtype=dtype, device="meta")
            except (KeyError, TypeError, RuntimeError) as error:
                raise UserError(
                    f"{path}: key {key} has no supported type and shape ({error})"
                ) from error
            yield StoredTensor(path, key.removeprefix(wrapping), empty)


def _packed_header(path: Path) -> dict[str, Any]:
    """Read the header of a packed safetensors file."""
    import zstandard

    try:
        with path.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as file:
            header = _read_header(file, path)
    except (zstandard.ZstdError, struct.error, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cut short or corrupt ({error}); download it again") from error
    return {key: entry for key, entry in header.items() if key != "__metadata__"}


def _read_header(stream: IO[bytes], path: Path) -> dict[str, Any]:
    (num_bytes,) = struct.unpack("<Q", stream.read(8))
    if num_bytes > _MAX_HEADER_BYTES:
        raise ValueError("no safetensors header")
    text = stream.read(num_bytes).decode()
    header = parse_json(text, source=str(path), advice="download it again")
    if not isinstance(header, dict):
        raise ValueError("no safetensors header")
    return cast("dict[str, Any]", header)


def _fitting(dit: DiT, tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """Pass tensors on, but refuse an 8-bit one where none is wanted, and the other way round."""
    is_fp8 = {name: value.dtype == FP8 for name, value in dit.state_dict().items()}
    for path, key, tensor in tensors:
        if (tensor.dtype == FP8) != is_fp8.get(key, False) and key in is_fp8:
            wanted = "8 bits" if is_fp8[key] else "16 or 32 bits"
            raise UserError(
                f"{path}: key {key} is stored as {tensor.dtype}, expected {wanted}; "
                "check fp8_quant in the config"
            )
        yield StoredTensor(path, key, tensor)


def _empty_dit(config: ReleaseConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config.model_config, is_fp8=config.engine_config.fp8_quant)


def check_dit(config: ReleaseConfig, paths: Iterable[Path]) -> int:
    """Check from headers alone that shards fill the transformer exactly.

    Returns:
        Size of the tensors, in bytes as stored.
    """
    dit = _empty_dit(config)
    matched = match(dit, _fitting(dit, read_headers(paths)))
    return sum(part.numel() * part.element_size() for _, part in matched)


# Models by name -----------------------------------------------------------------------------------


def find_model(model: str, *, has_cuda: bool | None = None, wants_download: bool = False) -> Source:
    """Find the JSON config of a model, its only layer of settings.

    Args:
        has_cuda: whether there is a CUDA device; None: look for one.
        model: `demo`, `demo-base`, a name of `RELEASED`, a JSON file, a folder with one
            `*config.json`, or `auto`: 4.5B_distill where there is CUDA, else the demo.
        wants_download: whether the weights come from the hub in any case.
    """
    is_auto = model == "auto"
    if is_auto:
        has_cuda = torch.cuda.is_available() if has_cuda is None else has_cuda
        model = REAL_MODEL if has_cuda else "demo"
    if model in RELEASED:
        path = CONFIGS / f"{model}.json"
        may_download = "missing" if is_auto else "never"
        return _source_of(
            model,
            path,
            plans_by_sizes=not is_auto,
            download="always" if wants_download else may_download,
        )
    if model in DEMOS:
        path = DEMOS[model]
        if not path.is_file():
            raise UserError(f"{path}: the demo checkpoint is missing: restore it with git")
        return _source_of(model, path, download="always" if wants_download else "never")
    path = given_path(model, name="model")
    if path.is_dir():
        path = _only_config(path)
    if not path.is_file():
        raise UserError(
            f"{model}: no such file or folder; a model is a JSON config, a folder that holds one, "
            f"or one of {', '.join((*DEMOS, *RELEASED))}"
        )
    name = path.parent.resolve().name
    return _source_of(name, path, download="always" if wants_download else "never")


def is_known(name: str) -> bool:
    """Tell whether a name, or a JSON config in its place, is of a MAGI-1 model."""
    if name in RELEASED or name in DEMOS:
        return True
    place = Path(name).expanduser()
    files = _configs(place) if place.is_dir() else [place]
    try:
        return any(path.suffix == ".json" and "runtime_config" in read_json(path) for path in files)
    except (UserError, OSError, TypeError):
        return False


def _source_of(name: str, path: Path, **facts: Any) -> Source:
    return Source(name, path.parent, layers=(path,), **facts)


def is_released(source: Source) -> bool:
    """Tell whether a model was named by a name of `RELEASED`."""
    return source.layers[0].parent == CONFIGS


def _configs(folder: Path) -> list[Path]:
    # hidden: macOS leaves ._NAME next to NAME on foreign disks
    return sorted(p for p in folder.glob("*config.json") if not p.name.startswith("."))


def _only_config(folder: Path) -> Path:
    found = _configs(folder)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{folder}: must hold one *config.json, found {names}: name the JSON file itself"
        )
    return found[0]


def locate(config: Config, source: Source) -> Config:
    """Return the config with its folders found: from here, as upstream, or beside the JSON."""
    run = config.runtime_config
    paths = {name: find_path(getattr(run, name), source) for name in PATH_FIELDS}
    return replace(config, runtime_config=replace(run, **paths))


def find_path(path: str, source: Source) -> str:
    """Return a path as it is if it exists from here, else beside the JSON if it exists there."""
    beside = source.layers[0].parent / path
    return str(beside) if not Path(path).exists() and beside.exists() else path


def are_there(config: ReleaseConfig) -> bool:
    """Whether the folders that a config names hold a whole model."""
    try:
        Checkpoint.find(config).check_complete()
    except UserError:
        return False
    return True


def download(config: Config, source: Source, *, hub: Hub = HUB) -> Config:
    """Return the config with the folders of a released model, from the hub or its local cache."""
    if not is_released(source):
        raise UserError(
            f"--download fetches a released model, not {source.name}: give --model as one of "
            f"{', '.join(RELEASED)}"
        )
    folder = fetch(REPOSITORY, **_wanted(config, source), hub=hub)
    return _in_folder(config, source, folder)


def missing_files(config: ReleaseConfig, source: Source, *, hub: Hub = HUB) -> Missing | None:
    """Return what `download` would fetch; None: nothing, a copy is in the local hub cache."""
    wanted = _wanted(config, source)
    if local_copy(REPOSITORY, **wanted, hub=hub) is not None:
        return None
    missing = find_missing(REPOSITORY, patterns=wanted["patterns"], hub=hub)
    missing.check_room()
    return missing


def _wanted(config: ReleaseConfig, source: Source) -> dict[str, Any]:
    """Return which files of the repository are wanted, and what tells a whole copy."""
    return {
        "patterns": [f"ckpt/magi/{source.name}/*", "ckpt/vae/*", "ckpt/t5/*"],
        "is_whole": lambda folder: are_there(_in_folder(config, source, folder)),
    }


def _in_folder(config: Config, source: Source, folder: Path) -> Config:
    """Return the config with the folders of a copy of the repository."""
    parts = dict(zip(PATH_FIELDS, (f"magi/{source.name}", "t5", "vae"), strict=True))
    paths = {field: str(folder / "ckpt" / part) for field, part in parts.items()}
    return replace(config, runtime_config=replace(config.runtime_config, **paths))
