"""The contract between a video model and everything that runs, plans, tunes and measures it.

A model package has one module `model` with one object `MODEL`, a `VideoModel`. Nothing outside the
package knows more of the model than this contract says, and the package imports nothing of what
uses it. `flowcache.runtime.run` leads a request through it:

    model = load_model("skyreels_v2")
    request = Request(preset="flowcache_fast", model="demo", overrides=["prompt=a red circle"])
    job = prepare(model, request)       # find, read_settings, check, fetch, media, work, stages
    print(describe(job))                # title, lines
    run(job)                            # encode, load, generate; then the mp4 and its JSON

In between a model is called in this order:

    source = model.find("demo")                      # small files only, nothing is downloaded
    config = model.check(config, source)             # settings that fit the model and the inputs
    config, source = model.fetch(config, source)     # all files are on the disk
    work = model.work(config, source, media, dtype)  # ticks, FLOPs, bytes: derived once
    dit, vae = model.load_dit(job), model.load_vae(job)
    for progress in model.generate(dit, vae, config, inputs, work=work, stats=stats):
        progress.frames                                  # pixels of the chunks that became clean

To add a model: write the package with its `model.MODEL`, and name it in `MODELS`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from flowcache.errors import UserError

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from torch import Tensor, nn

    from flowcache.attention import AttentionShape
    from flowcache.policies import Observe, Policies
    from flowcache.runtime.checks import Decoded
    from flowcache.runtime.hub import Missing
    from flowcache.runtime.memory import Footprint, MemoryPlan
    from flowcache.runtime.ops import Draw
    from flowcache.runtime.parallel import Ranks
    from flowcache.runtime.profile import Setting
    from flowcache.runtime.record import Record
    from flowcache.runtime.stats import RunStats
    from flowcache.schedule import Tick

MODELS = {
    "skyreels_v2": "skyreels_v2.model",
    "magi1": "magi1.model",
    "self_forcing": "self_forcing.model",
}
"""Package -> module with its `MODEL`."""


def load_model(name: str) -> VideoModel:
    """Import a model by the name of its package; nothing of the others is imported."""
    return cast("VideoModel", importlib.import_module(MODELS[name]).MODEL)


def architecture_of(model: str) -> str:
    """Return the package of the first model that knows a checkpoint by its name or place."""
    for package in MODELS:
        if load_model(package).knows(model):
            return package
    raise UserError(
        f"model {model} is none of a released name, a checkpoint folder or a hub id of "
        f"{' or '.join(MODELS)}: give architecture, too"
    )


def models_with(module: str) -> list[str]:
    """Return the models that have what some tools ask for, such as `bench` or `gpu`."""
    return [name for name in MODELS if importlib.util.find_spec(f"{name}.{module}")]


def load_bench(name: str) -> Any:
    """Import what tools that tune and compare ask of a model: its module `bench`."""
    if name not in models_with("bench"):
        raise UserError(f"{name} has no methods to tune or compare yet")
    return importlib.import_module(f"{name}.bench")


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    preset: str = "base"
    model: str = "auto"
    """A checkpoint, by its place or by a name, see `VideoModel.find`."""
    overrides: Sequence[str] = ()
    """`key=value` texts."""
    out: str | None = None
    """An `.mp4` file, or a folder in which a fresh name is found; None: `folder`."""
    overwrite: bool = False
    folder: Path = Path("result")
    stem: str | None = None
    """Name of the video in a folder, without number and `.mp4`; None: preset and seed."""
    record: bool = False
    """Whether `NAME.record.json` is written, too: what each pass cost, what the caches held."""
    replay: str | None = None
    """The record of a run whose decisions are made again."""
    is_dry: bool = False
    """Whether the plan alone is wanted."""
    download: bool = False
    """Whether the weights of a released model come from the hub."""


@dataclass(frozen=True)
class Source:
    """The model that a request names, and what of it is on the disk."""

    name: str
    """As reports show it."""
    folder: Path | None = None
    """Where presets and profiles of its own may lie; None: it is not on the disk yet."""
    layers: tuple[Path, ...] = ()
    """Settings of the model itself, which stand between `base.yaml` and the preset."""
    plans_by_sizes: bool = False
    """Whether a dry run needs none of its files."""
    download: Literal["never", "missing", "always"] = "missing"
    """Whether its weights come from the hub."""
    files: Any = None
    """The checkpoint's parts, of the model's own type; None: not looked for yet."""
    sizes: Any = None
    """Sizes of the transformer where the settings do not hold them; None: not known."""


@dataclass(frozen=True)
class SegmentWork:
    """What is denoised by ticks of its own: a window of a long video, or all of it."""

    ticks: Sequence[Tick]
    tokens: Mapping[int, int]
    """Chunk -> its tokens, given chunks included."""
    given: Sequence[int]
    """Chunks that are clean from the start."""
    frames: Sequence[Sequence[int]]
    """For each chunk the frames `[first, stop)` of the new video that show it."""
    kv_tokens: int
    """Tokens that each layer's KV cache of a branch holds at most."""
    cut: Any
    """The model's own description of its chunks."""

    @property
    def generated(self) -> Sequence[int]:
        """Chunks that are denoised."""
        return [chunk for chunk in self.tokens if chunk not in self.given]


@dataclass(frozen=True)
class Work:
    """What a run does if every step is computed; reuse only saves."""

    segments: tuple[SegmentWork, ...]
    branches: tuple[str, ...]
    """Guidance passes that decide on their own, as records name them."""
    passes: tuple[str, ...]
    """All guidance passes of a step."""
    is_whole: bool
    """Whether all active chunks go through the blocks together (full attention)."""
    num_caches: int
    """Guidance passes with a KV cache of their own."""
    frame_tokens: int
    divided_tokens: int
    """Tokens that several processes divide, at least."""
    pass_tokens: int
    """Tokens of one branch that go through the blocks at once, at most."""
    text_tokens: int
    """Tokens of a prompt, as cross-attention sees them."""
    attention: AttentionShape
    """The largest self-attention."""
    flops: int
    weight_bytes: int
    """The transformer's weights."""
    kv_bytes: int
    """The KV caches of all layers and branches."""
    scoring_bytes: int
    """Extra memory while the KV cache is compressed, kept queries included."""
    query_bytes: int
    """Queries that are kept from one compression to the next."""
    stored_bytes: int
    """Stored results from which reused steps are made, and signals that are compared."""
    activation_bytes: int
    """Estimate of what one forward needs in addition to weights and caches."""
    loop: Any
    """What the model's own denoising loop takes of the settings."""
    kv_device_bytes: int = 0
    """Of quantised KV caches: what stays on the device where keys are on the host."""
    kv_read_bytes: int = 0
    """Of quantised KV caches: the layer that is read, and the scratch of quantising."""
    block_bytes: Sequence[int] = ()
    """The weights of each of the transformer's blocks."""
    num_passes: int = 0
    """How often the blocks are run, one after the other, in all branches."""
    read_tokens: int = 0
    """Tokens of KV caches that each layer reads in all these passes together."""

    @property
    def num_ticks(self) -> int:
        """Ticks of all segments."""
        return sum(len(segment.ticks) for segment in self.segments)

    @property
    def num_chunks(self) -> int:
        """Chunks that are denoised."""
        return sum(len(segment.generated) for segment in self.segments)


@dataclass(frozen=True)
class Job:
    """A request that was found to be in order; nothing large is loaded yet."""

    model: VideoModel
    request: Request
    preset: str
    """Its name."""
    config: Any
    """All settings, an instance of `model.schema`."""
    source: Source
    media: Any
    """The given pictures, of the model's own type."""
    before: Tensor | None
    """Frames that the video begins with, uint8 `[T, H, W, 3]`."""
    device: torch.device
    dtype: torch.dtype
    work: Work
    """Of one of the processes that divide the run."""
    replay: Record | None
    ranks: Ranks
    """The processes that make the video; before `run` their layout only."""
    memory: MemoryPlan | None = None
    """None: it is not known how much there is, and nothing is moved."""
    path: Path | None = None
    """Of the video; None: sizes alone are planned."""
    keeps_partial: bool = True
    """Whether the frames of an unfinished video are kept, and where it lies is said; False: it is
    made in a folder that will be gone."""

    @property
    def placed(self) -> Any:
        """The settings, with things kept on the host as the memory plan says."""
        if self.memory is None:
            return self.config
        return self.model.placed(self.config, self.memory.residence)

    @property
    def residence(self) -> Residence:
        """What is kept on the host."""
        return self.model.residence(self.placed)

    @property
    def dit_device(self) -> torch.device:
        """Where the transformer lies before blocks stream: on the host, if some stay there."""
        import torch

        return self.device if self.residence.blocks_on_device is None else torch.device("cpu")

    @property
    def dit_source_device(self) -> torch.device:
        """Where the transformer is loaded: on the host, if it is then quantised."""
        import torch

        return self.dit_device if self.config.quantize is None else torch.device("cpu")

    @property
    def text_device(self) -> torch.device:
        """Where the text encoder runs."""
        import torch

        return torch.device("cpu") if self.residence.text_on_host else self.device

    @property
    def text_source_device(self) -> torch.device:
        """Where the text encoder is loaded: on the host, if it is then quantised."""
        import torch

        return self.text_device if self.config.text_quantize is None else torch.device("cpu")

    def changed(self, **values: Any) -> Job:
        """Return the job with other settings, by arguments of the command line, such as `seed`."""
        config = self.config
        for argument, value in values.items():
            config = _changed(config, self.model.keys[argument], value)
        return replace(self, config=config)

    def value(self, argument: str) -> Any:
        """Return the setting that an argument of the command line names, such as `seed`."""
        return attrgetter(self.model.keys[argument])(self.config)


def _changed(config: Any, key: str, value: Any) -> Any:
    first, _, rest = key.partition(".")
    return replace(
        config, **{first: _changed(getattr(config, first), rest, value) if rest else value}
    )


@dataclass(frozen=True)
class Loaded:
    """The networks that make the frames."""

    dit: Any
    vae: Any

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The networks by what messages call them."""
        return {"transformer": self.dit, "VAE": self.vae.model}


@dataclass(frozen=True)
class Progress:
    """What just happened: a tick, and the frames that can be shown after it."""

    tick: Tick
    later: Future[Decoded] | None
    """New pixel frames, about -1..1, which may be under way, or None."""

    @property
    def frames(self) -> Tensor | None:
        """The new pixel frames, waited for if they are under way."""
        return None if self.later is None else self.later.result().frames


@dataclass(frozen=True)
class Residence:
    """What is kept in the memory of the host while the device does not need it.

    Each costs copies and leaves the video as it is, up to rounding: the text encoder's sums are
    rounded in another order on the host, those of a convolution by the size of a strip.
    """

    text_on_host: bool = False
    """The text encoder runs on the host."""
    dit_aside: bool = False
    """The transformer leaves the device while the VAE works."""
    kv_on_host: bool = False
    """Keys and values lie on the host and are copied when they are read."""
    blocks_on_device: int | None = None
    """Blocks of the transformer that stay; the others are copied when they are run. None: all."""
    vae_strips: int | None = None
    """Strips in which pictures are encoded and decoded, one after the other; what the decoder
    remembers of the others is on the host. None: whole pictures."""

    @property
    def moved(self) -> list[str]:
        """What is not simply on the device."""
        found = {
            "the text encoder runs on the host": self.text_on_host,
            "transformer and VAE take turns": self.dit_aside,
            "keys and values lie on the host": self.kv_on_host,
            f"{self.blocks_on_device} of the transformer's blocks stay, the others are copied when "
            "they are run": self.blocks_on_device is not None,
            f"pictures are decoded in {self.vae_strips} strips": (self.vae_strips or 1) > 1,
        }
        return [name for name, is_so in found.items() if is_so]

    @property
    def rounds_otherwise(self) -> list[str]:
        """What makes sums in another order than a run with everything on the device."""
        found = {"text encoder": self.text_on_host, "VAE": (self.vae_strips or 1) > 1}
        return [name for name, is_so in found.items() if is_so]

    def describe(self) -> str:
        """Say what is where."""
        return ", ".join(self.moved) or "all on the device"


class VideoModel(Protocol):
    """What a run needs of a model.

    The settings of all models share the sections `reuse`, `kv`, `parallel` and the keys `prompt
    device compile overlap offload memory_limit embedding_cache attention_kernel quantize
    text_quantize`; others are reached through `keys`.
    """

    name: str
    """Of the package."""
    presets: Path
    """Folder of the presets; `base.yaml` stands below all of them."""
    schema: type
    """Dataclass of all settings."""
    keys: Mapping[str, str]
    """Argument -> setting: those of the command line, num_steps, num_frames, height, width, fps,
    guidance.

    The seed, for example, is `seed` in one model and `runtime_config.seed` in another.
    """

    places: Collection[str] = ()
    """Names of settings, in any section, that say where files of the model are."""
    on_host: Mapping[str, tuple[str, Any]]
    """Field of `Residence` -> the setting that asks for it, and the value with which it does."""
    amounts: Collection[str] = ("blocks_on_device",)
    """Fields of `Residence` that are settings of the same name; null leaves them to the plan."""

    # Files and settings -----------------------------------------------------------------------

    def knows(self, name: str, /) -> bool:
        """Tell whether a name or place is a checkpoint of this model."""
        ...

    def required(self, source: Source, /) -> Collection[str]:
        """Return the pictures that a video must be given, by their arguments; default: none."""
        return ()

    def find(self, name: str, /, *, is_dry: bool = False, download: bool = False) -> Source:
        """Find a model by `demo`, `auto`, a released name, a place on the disk or a hub id.

        Args:
            is_dry: whether sizes alone may do.
            download: whether its weights are to come from the hub.
        """
        ...

    def check(self, config: Any, source: Source, /) -> Any:
        """Return the settings to run: fitting the model, turned to the shape of given pictures."""
        ...

    def dtype(self, config: Any, device: torch.device, /) -> torch.dtype:
        """Return the type of the weights inside the transformer's blocks."""
        ...

    def check_device(
        self, config: Any, source: Source, device: torch.device, dtype: torch.dtype, /
    ) -> None:
        """Refuse settings that the device cannot carry out."""

    def missing(self, config: Any, source: Source, /) -> Missing | None:
        """Return what `fetch` would download; None: nothing."""
        ...

    def fetch(self, config: Any, source: Source, /) -> tuple[Any, Source]:
        """Return settings and source with the `files` in their places, downloaded if need be."""
        ...

    def check_files(self, config: Any, source: Source, /) -> None:
        """Check that the weights of all parts are there, whole, and fit; reads headers only."""
        ...

    def fingerprint(self, source: Source, /) -> str:
        """Return a hash of the transformer, see `flowcache.runtime.profile.fingerprint`."""
        ...

    def identity(self, job: Job, /) -> Hashable:
        """Return what loaded networks depend on; neither prompt nor seed is part of it."""
        ...

    def ingredients(self, job: Job, /) -> Mapping[str, Path | Sequence[Tensor]]:
        """Return what a video is made from in addition to settings and transformer, by name."""
        ...

    def setting(self, config: Any, /) -> Setting:
        """Return what a tuned profile must fit."""
        ...

    # Planning ---------------------------------------------------------------------------------

    def media(self, config: Any, source: Source, /) -> Any:
        """Read the pictures that the settings name."""
        ...

    def before(self, media: Any, /) -> Tensor | None:
        """Return given frames that the video begins with, uint8 `[T, H, W, 3]`."""
        return None

    def work(self, config: Any, source: Source, media: Any, dtype: torch.dtype, /) -> Work:
        """Derive from the settings what the run does; without `source.files` by sizes alone."""
        ...

    def title(self, job: Job, /) -> Sequence[str]:
        """Describe in two lines which model and which preset run."""
        ...

    def lines(self, config: Any, work: Work, /) -> Sequence[str]:
        """Describe the video and what it costs."""
        ...

    def footprint(self, job: Job, /, *, overlaps: bool) -> Footprint:
        """Return what counts the memory of each stage of the run.

        Args:
            overlaps: whether chunks are decoded while others are denoised.
        """
        ...

    def residence(self, config: Any, /) -> Residence:
        """Return what the settings ask to be on the host."""
        asked: dict[str, Any] = {
            part: attrgetter(key)(config) == at for part, (key, at) in self.on_host.items()
        }
        return Residence(**asked, **{name: getattr(config, name) for name in self.amounts})

    def placed(self, config: Any, residence: Residence, /) -> Any:
        """Return the settings with things where a memory plan puts them."""
        for part, (key, value) in self.on_host.items():
            config = _changed(config, key, value) if getattr(residence, part) else config
        return replace(config, **{name: getattr(residence, name) for name in self.amounts})

    # Running ----------------------------------------------------------------------------------

    def text_facts(self, job: Job, /) -> Mapping[str, Any]:
        """Return what encoded prompts depend on: `prompts`, the encoder, its type."""
        ...

    def load_text(self, job: Job, /) -> Any:
        """Load the text encoder, whose network is `model`, to `job.text_source_device`."""
        ...

    def encode_text(self, job: Job, encoder: Any, /) -> Tensor:
        """Return the encoded prompts of the guidance passes."""
        ...

    def inputs(self, job: Job, encoded: Tensor, /) -> Any:
        """Return what the video is made from: the encoded prompts and all given pictures."""
        ...

    def load_dit(self, job: Job, /) -> Any:
        """Load the transformer to `job.dit_source_device`.

        Its `kernel`, `cross_kernel`, `parts` and `stream` are set afterwards.
        """
        ...

    def blocks(self, dit: Any, /) -> Sequence[nn.Module]:
        """Return the blocks of the transformer, in the order in which they are run."""
        ...

    def quantised(self, dit: Any, /) -> Iterable[nn.Module]:
        """Return the parts of the transformer whose linear layers `quantize` makes 8-bit."""
        return self.blocks(dit)

    def compile(self, job: Job, dit: Any, /) -> None:
        """Compile the transformer's blocks for the lengths that the run has."""
        ...

    def load_vae(self, job: Job, /) -> Any:
        """Load the VAE; its network is `model`."""
        ...

    def generate(
        self,
        dit: Any,
        vae: Any,
        config: Any,
        inputs: Any,
        /,
        *,
        stats: RunStats,
        work: Work | None = None,
        draw: Draw | None = None,
        observe: Observe | None = None,
        policies: Policies | None = None,
        ranks: Ranks | None = None,
    ) -> Generator[Progress, None, None]:
        """Make a video; yield after every tick, with the frames that are finished.

        Args:
            work: what the settings ask for; default: derived from them.
            draw: makes all noise; default: from a generator seeded with the settings' seed.
            observe: is shown the velocities of computed steps.
            policies: decide what is computed; default: as the settings say.
            ranks: the processes that divide the work; each yields the whole video.
        """
        ...
