import json
import struct
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.runtime.weights import (
    Origin,
    check_files,
    find_shards,
    load_files,
    load_into,
    match,
    read,
    read_model_config,
    rename,
)


class Tied(nn.Module):
    """Two layers that share one weight, and a buffer that files hold too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))


def _empty() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"0.weight": (4, 3), "0.bias": (4,), "1.weight": (2, 4)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def _two_shards(folder: Path, *, is_pickled: bool = False) -> None:
    """Write the tensors as two numbered shards with an index."""
    tensors, stem, suffix = _tensors(), "model", "safetensors"
    if is_pickled:
        stem, suffix = "pytorch_model", "bin"
    names = {key: f"{stem}-0000{1 + (key == '1.weight')}-of-00002.{suffix}" for key in tensors}
    for name in set(names.values()):
        shard = {key: tensors[key] for key in tensors if names[key] == name}
        torch.save(shard, folder / name) if is_pickled else save_file(shard, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def _fails(check: Callable[[], object], *parts: str) -> None:
    """Require a UserError of one line that holds all the given parts."""
    with pytest.raises(UserError) as caught:
        check()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_fills_a_module_of_the_meta_device(tmp_path: Path, suffix: str):
    path, tensors = tmp_path / f"model{suffix}", _tensors()
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    module = _empty()
    load_files(module, [path], dtype=None, device="cpu")
    for key, value in module.state_dict().items():
        assert torch.equal(value, tensors[key])
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_take_the_asked_dtype_or_stay_as_stored(tmp_path: Path, dtype: torch.dtype):
    stored = {key: value.to(torch.bfloat16) for key, value in _tensors().items()}
    save_file(stored, tmp_path / "model.safetensors")
    module, kept = _empty(), _empty()
    load_files(module, find_shards(tmp_path), dtype=dtype, device="cpu")
    load_files(kept, find_shards(tmp_path), dtype=None, device="cpu")
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert torch.equal(module.state_dict()["0.bias"], stored["0.bias"].to(dtype))


def test_loaded_weights_outlive_their_file(tmp_path: Path):
    path, tensors = tmp_path / "model.safetensors", _tensors()
    save_file(tensors, path)
    module = _empty()
    load_files(module, [path], dtype=None, device="cpu")
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.write(b"\0" * size)
    assert torch.equal(module.state_dict()["0.weight"], tensors["0.weight"])


def test_shards_of_an_index_are_read_together(tmp_path: Path):
    _two_shards(tmp_path)
    paths = find_shards(tmp_path)
    assert [path.name[:11] for path in paths] == ["model-00001", "model-00002"]
    module = _empty()
    load_files(module, paths, dtype=None, device="cpu")
    assert torch.equal(module.state_dict()["1.weight"], _tensors()["1.weight"])


def test_check_counts_the_bytes_that_fill_the_module(tmp_path: Path):
    _two_shards(tmp_path)
    assert check_files(_empty(), find_shards(tmp_path)) == 4 * (12 + 4 + 8)


def test_check_reads_headers_not_data(tmp_path: Path):
    num_rows = 2**28
    header = json.dumps(
        {"weight": {"dtype": "F32", "shape": [num_rows, 1], "data_offsets": [0, 4 * num_rows]}}
    ).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * num_rows)  # a hole: takes no room on disk
    with torch.device("meta"):
        module = nn.Linear(1, num_rows, bias=False)
    process = psutil.Process()
    before = process.memory_info().rss
    for _names, part in match(module, read([path])):
        assert part.shape == (num_rows, 1)
        assert process.memory_info().rss - before < 2**26


def test_one_stored_tensor_can_fill_several_parameters(tmp_path: Path):
    joint = torch.arange(12.0).view(6, 2)
    save_file({"joint": joint}, tmp_path / "model.safetensors")
    module = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])

    def origin(name: str) -> Origin:
        part = int(name[0])
        return Origin("joint", lambda tensor: tensor.tensor_split(3)[part])

    load_files(module, find_shards(tmp_path), origin=origin, dtype=None, device="cpu")
    assert torch.equal(torch.cat(list(module.parameters())), joint)


def test_tied_parameters_need_one_stored_tensor_and_stay_tied(tmp_path: Path):
    stored = {"second.weight": torch.ones(2, 2), "count": torch.arange(3)}
    save_file(stored, tmp_path / "model.safetensors")
    module = Tied().to("meta")
    module.second.weight = module.first.weight
    load_files(module, find_shards(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert module.first.weight is module.second.weight
    assert torch.equal(module.first.weight, torch.ones(2, 2, dtype=torch.bfloat16))
    assert torch.equal(module.get_buffer("count"), torch.arange(3))
    assert module.get_buffer("count").dtype == torch.int64


def test_tied_parameters_with_different_stored_values_are_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    stored = {"first.weight": torch.ones(2, 2), "second.weight": torch.zeros(2, 2)}
    save_file(stored | {"count": torch.arange(3)}, path)
    _fails(lambda: check_files(Tied(), [path]), str(path), "second.weight", "first.weight")


def test_rules_of_a_rename_apply_one_after_the_other():
    rules = ((r"^a\.(\d+)\.", r"b.\1."), (r"\.x$", ".y"))
    assert rename("a.12.x", rules) == "b.12.y"
    assert rename("c.a.12.x.z", rules) == "c.a.12.x.z"


def _changed(change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    tensors = _tensors()
    change(tensors)
    return tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        (_changed(lambda t: t.pop("0.bias")), ["key 0.bias is missing"]),
        (
            _changed(lambda t: (t.pop("0.bias"), t.pop("1.weight"))),
            ["key 0.bias (and 1 more) is missing"],
        ),
        (_changed(lambda t: t.update(extra=torch.ones(1))), ["key extra is unexpected"]),
        (
            _changed(lambda t: t.update({"1.weight": torch.ones(2, 5)})),
            ["key 1.weight has shape [2, 5], expected [2, 4]"],
        ),
        (
            _changed(lambda t: t.update({"0.bias": torch.ones(4, dtype=torch.int64)})),
            ["key 0.bias has dtype torch.int64, expected a floating type"],
        ),
    ],
)
def test_a_misfit_names_file_and_key(
    tmp_path: Path, suffix: str, tensors: dict[str, Tensor], parts: list[str]
):
    path = tmp_path / f"model{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    _fails(lambda: check_files(_empty(), [path]), str(path), *parts)
    load: Callable[[], object] = lambda: load_files(_empty(), [path], dtype=None, device="cpu")  # noqa: E731
    _fails(load, str(path), *parts)
    _fails(lambda: load_into(_empty(), read([path]), dtype=None, device="cpu"), str(path), *parts)


def test_a_part_of_a_stored_tensor_with_a_wrong_shape_names_the_parameter(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"joint": torch.ones(5, 2)}, path)
    with torch.device("meta"):
        module = nn.Linear(2, 2, bias=False)
    origin = Origin("joint", lambda tensor: tensor.view(3, 2, 2)[0])
    _fails(
        lambda: check_files(module, [path], origin=lambda _: origin),
        str(path),
        "key joint has shape [5, 2], expected [2, 2] for weight",
    )


def test_a_key_missing_from_several_shards_names_their_folder(tmp_path: Path):
    _two_shards(tmp_path)
    save_file({"0.bias": torch.ones(4)}, tmp_path / "model-00001-of-00002.safetensors")
    _fails(
        lambda: check_files(_empty(), find_shards(tmp_path)),
        f"2 files of {tmp_path}",
        "key 0.weight is missing",
    )


def test_a_key_in_two_files_is_refused(tmp_path: Path):
    for name in ("a", "b"):
        save_file(_tensors(), tmp_path / f"{name}.safetensors")
    _fails(
        lambda: check_files(_empty(), find_shards(tmp_path)),
        "b.safetensors: key 0.bias is also in",
        "a.safetensors",
    )


def test_a_missing_folder_shard_or_file_is_named(tmp_path: Path):
    _fails(lambda: find_shards(tmp_path / "none"), str(tmp_path / "none"), "no such folder")
    _fails(lambda: find_shards(tmp_path), str(tmp_path), "no *.safetensors file")
    missing = tmp_path / "model.safetensors"
    _fails(lambda: check_files(_empty(), [missing]), str(missing), "no such file")
    _two_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    parts = [str(tmp_path / "model-00002-of-00002.safetensors"), "no such file"]
    _fails(lambda: find_shards(tmp_path), *parts, "model.safetensors.index.json calls for it")
    (tmp_path / "model.safetensors.index.json").unlink()
    _fails(lambda: find_shards(tmp_path), *parts)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_unreadable_index_is_named(tmp_path: Path, content: str):
    save_file(_tensors(), tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    _fails(lambda: find_shards(tmp_path), str(path), "index")


SECOND_DISK = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2)  # disks in all: 2


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        pytest.param(".safetensors", lambda data: data[:-8], id="cut"),
        pytest.param(
            ".safetensors",
            lambda data: data[:9] + bytes([data[9] ^ 0xFF]) + data[10:],
            id="flipped",
        ),
        pytest.param(".safetensors", lambda data: data + b"\0" * 8, id="longer"),
        pytest.param(".safetensors", lambda data: b"\xff" * 8 + data[8:], id="announces too much"),
        pytest.param(".safetensors", lambda _: b"", id="empty"),
        *[
            pytest.param(".pth", lambda data, s=s: data[: int(s * len(data))], id=f"pickle cut {s}")
            for s in (0.0, 0.3, 0.9, 0.999)
        ],
        pytest.param(".pth", lambda data: data[:-22] + SECOND_DISK + data[-22:], id="on two disks"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]):
    path = tmp_path / f"model{suffix}"
    save_file(_tensors(), path) if suffix == ".safetensors" else torch.save(_tensors(), path)
    path.write_bytes(damage(path.read_bytes()))
    _fails(lambda: check_files(_empty(), [path]), str(path), "cut short or corrupt")


@pytest.mark.parametrize("content", [[1, 2], {"0.bias": 3}, nn.Linear(1, 1)])
def test_a_pth_file_of_something_else_is_named(tmp_path: Path, content: object):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    _fails(lambda: check_files(_empty(), [path]), str(path))


def test_a_git_lfs_pointer_is_told_from_a_corrupt_file(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    _fails(lambda: check_files(_empty(), [path]), str(path), "git lfs pull")


def test_a_pth_file_of_the_oldest_format_is_read_too(tmp_path: Path):
    path, tensors = tmp_path / "model.pth", _tensors()
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    module = _empty()
    load_files(module, [path], dtype=None, device="cpu")
    assert torch.equal(module.state_dict()["0.weight"], tensors["0.weight"])


# Other forms of the same weights ------------------------------------------------------------------


def _pickled(folder: Path) -> None:
    torch.save(_tensors(), folder / "pytorch_model.bin")


def _pickled_shards(folder: Path) -> None:
    _two_shards(folder, is_pickled=True)


def _pickled_and_not(folder: Path) -> None:
    save_file(_tensors(), folder / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, folder / "pytorch_model.bin")


def _with_copies(folder: Path) -> None:
    save_file(_tensors(), folder / "model.safetensors")
    half = {key: value.half() for key, value in _tensors().items()}
    save_file(half, folder / "model.fp16.safetensors")
    save_file(half, folder / "model.fp16-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.fp16.json").write_text("{}")


def _shards_with_copies(folder: Path) -> None:
    _two_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    for path in sorted(folder.glob("*.safetensors")):
        copy = f"{path.stem}.fp16.safetensors"  # as diffusers named them once
        (folder / copy).write_bytes(path.read_bytes())


def _only_a_copy(folder: Path) -> None:
    save_file(_tensors(), folder / "model.fp16.safetensors")


def _with_what_else_lies_there(folder: Path) -> None:
    _two_shards(folder)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    for name in (".DS_Store", ".gitattributes", "README.md", "LICENSE"):
        (folder / name).write_text("text")
    index = folder / "model.safetensors.index.json"
    content = {"metadata": {"total_size": "much", "format": "pt"}, "extra": [1]}
    index.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(content | json.loads(index.read_text())).encode()
    )


def _wrapped(prefix: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = {prefix + key: value for key, value in _tensors().items()}
        save_file(tensors, folder / "model.safetensors")

    return write


def _in_a_state_dict(folder: Path) -> None:
    state = {f"module.{key}": value for key, value in _tensors().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "pytorch_model.bin")


def _linked(folder: Path) -> None:
    blobs = folder.parent / "blobs"  # as the cache of the hub lays them out
    blobs.mkdir()
    save_file(_tensors(), blobs / "0123")
    (folder / "model.safetensors").symlink_to("../blobs/0123")


@pytest.mark.parametrize(
    "write",
    [
        _pickled,
        _pickled_shards,
        _pickled_and_not,
        _with_copies,
        _shards_with_copies,
        _only_a_copy,
        _with_what_else_lies_there,
        _wrapped("module."),
        _wrapped("model."),
        _wrapped("diffusion_model."),
        _wrapped("model.diffusion_model."),
        _in_a_state_dict,
        _linked,
    ],
)
def test_the_same_weights_are_read_in_every_form(tmp_path: Path, write: Callable[[Path], None]):
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    module = _empty()
    load_files(module, find_shards(folder), dtype=None, device="cpu")
    for key, value in _tensors().items():
        assert torch.equal(module.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("1.scale_weight", "is a scale of 8-bit weights, which are not read in this form"),
        ("scaled_fp8", "is a scale of 8-bit weights, which are not read in this form"),
        ("layers.weight", "holds all layers in one tensor, expected one per layer"),
        ("lora.up", "is unexpected; the file does not fit the model config, which has keys as"),
    ],
)
def test_a_form_that_is_not_read_is_named(tmp_path: Path, key: str, message: str):
    with torch.device("meta"):
        module = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(2, 2, bias=False))})
    save_file({key: torch.zeros(1, 2, 2)}, tmp_path / "model.safetensors")
    _fails(
        lambda: check_files(module, find_shards(tmp_path)),
        f"model.safetensors: key {key} {message}",
        "layers.0.weight" if "scale" not in key else "released *.safetensors",
    )


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\nb", "a\\b"]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: str):
    save_file(_tensors(), tmp_path / "model.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"0.weight": name}}))
    _fails(lambda: find_shards(folder), f"{path}: names the file {name!r}, but")


def test_links_that_go_round_are_named(tmp_path: Path):
    _two_shards(tmp_path)
    shard, index = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
    (tmp_path / shard).unlink()
    (tmp_path / shard).symlink_to(shard)
    _fails(lambda: find_shards(tmp_path), f"{shard}: no such file")
    (tmp_path / index).unlink()
    (tmp_path / index).symlink_to(index)
    _fails(lambda: find_shards(tmp_path), f"{index}: cannot be read (Too many levels")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-Q4.gguf", "no *.safetensors file; model-Q4.gguf is not read"),
        # whatever number is announced, finding out costs nothing
        (
            f"model-00001-of-{10**18}.safetensors",
            f"model-00002-of-{10**18}.safetensors: no such file, but model-00001-of-",
        ),
    ],
)
def test_files_that_are_no_whole_checkpoint_are_named(tmp_path: Path, name: str, said: str):
    (tmp_path / name).touch()
    _fails(lambda: find_shards(tmp_path), said)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_layers": 10**9}, "num_layers is 1e+09, expected at most 1000"),
        ({"ddconfig": {"depth": 1001}}, "depth is 1001, expected at most 1000"),
        ({"dim_mult": [1, 2, 10**30]}, "dim_mult is 1e+30, expected at most 1000000"),
        ({"dim_mult": [1] * 1001}, "dim_mult has 1001 entries, at most 1000 expected"),
        ([], "holds a list, expected a JSON object"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    tmp_path: Path, content: object, message: str
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    _fails(lambda: read_model_config(path), f"{path}: {message}")
