"""The folder of a Wan model, in both published layouts: what lies where.

The original layout is one flat folder; the `*-Diffusers` layout has a folder per part. Which one it
is, and which model, is read from the files, never from the name of the folder.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from flowcache.bounds import given_path
from flowcache.errors import UserError
from flowcache.runtime.embeddings import tokenizer_files
from flowcache.runtime.hub import HUB, Hub, Missing, fetch, find_missing, local_copy
from flowcache.runtime.weights import find_shards, read_model_config
from flowcache.wan import text, vae
from flowcache.wan.checkpoint import DiTFiles, Layout, read_diffusers, read_original, text_len
from flowcache.wan.dit import DiTConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PARTS: dict[Layout, dict[str, str]] = {
    "diffusers": {
        "config": "transformer/config.json",
        "dit": "transformer",
        "vae": "vae",
        "text_encoder": "text_encoder",
        "tokenizer": "tokenizer",
        "image_encoder": "image_encoder",
    },
    "original": {
        "config": "config.json",
        "dit": ".",
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "google/umt5-xxl",
        "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    },
}
"""Where the parts of a model lie in its folder."""


@dataclass(frozen=True)
class WanFolder:
    """A model on disk whose parts, folders or files, are all there.

    Attributes:
        dit: the transformer; without files where its weights come from elsewhere.
        image_encoder: CLIP's vision tower; None unless the model is I2V.
    """

    folder: Path
    dit: DiTFiles
    vae: Path
    text_encoder: Path
    tokenizer: Path
    image_encoder: Path | None = None

    @property
    def config(self) -> DiTConfig:
        """Sizes of the transformer."""
        return self.dit.config

    def check(self) -> None:
        """Check that the weights of all parts are there, whole, and fit; reads headers only."""
        self.dit.check()
        vae.check(self.vae)
        text.check_encoder(self.text_encoder, tokenizer=self.tokenizer, width=self.config.text_dim)
        if self.image_encoder is not None:
            text.check_vision(self.image_encoder, width=self.config.image_dim)

    def load_text(self, *, dtype: torch.dtype, device: torch.device | str) -> text.TextEncoder:
        """Load the text encoder."""
        return text.load_encoder(
            self.text_encoder,
            tokenizer=self.tokenizer,
            text_len=self.config.text_len,
            dtype=dtype,
            device=device,
        )


@dataclass(frozen=True)
class Folders:
    """Where the checkpoints of one model are found, on the disk and on the hub.

    Attributes:
        title: what messages call one; its last word alone, too.
        demo: folder of the demo.
        no_demo: what is said where it is missing.
        real: hub id of the model that `auto` is where there is CUDA.
        released: names of sizes that plan a run without files.
        has_dit: whether the folder holds the transformer's weights, too.
        files: of `real`, that are fetched; None: all.
    """

    title: str
    demo: Path
    no_demo: str
    real: str
    released: Collection[str]
    has_dit: bool = True
    files: tuple[str, ...] | None = None

    @property
    def noun(self) -> str:
        """The last word of the title."""
        return self.title.split()[-1]

    def choose(self, name: str) -> str:
        """Return the folder or hub id of a model, by either, `demo` or `auto`."""
        if name == "demo" or (name == "auto" and not torch.cuda.is_available()):
            if not self.demo.is_dir():
                raise UserError(f"{self.demo}: {self.no_demo}")
            return str(self.demo)
        if name in self.released and not Path(name).exists():
            raise UserError(
                f"{name} names sizes, for --dry-run: to make a video give the {self.noun}'s folder "
                f"or its hub id, as {self.real}"
            )
        return self.real if name == "auto" else str(given_path(name, name="model"))

    def find(self, place: str | Path, *, hub: Hub = HUB) -> WanFolder:
        """Find a model: a local folder, or else a hub id, whose copy or download is used."""
        folder = Path(place).expanduser()
        if not folder.exists():
            patterns = self._patterns(self._hub_id(place))
            folder = fetch(str(place), patterns=patterns, is_whole=self.is_whole, hub=hub)
        return self.find_in(folder)

    def find_download(self, place: str | Path, *, hub: Hub = HUB) -> Missing | None:
        """Return what `find` would download; None: nothing, the model is on the disk."""
        if Path(place).expanduser().exists():
            return None
        repository = self._hub_id(place)
        patterns = self._patterns(repository)
        if local_copy(repository, patterns=patterns, is_whole=self.is_whole, hub=hub) is not None:
            return None
        missing = find_missing(repository, patterns=patterns, hub=hub)
        missing.check_room()
        return missing

    def find_in(self, folder: Path) -> WanFolder:
        """Find the parts of a local model; all must be there."""
        if not folder.is_dir():
            raise UserError(f"{folder}: is a file; give the {self.noun}'s folder")
        for layout, names in PARTS.items():
            if (folder / names["config"]).is_file():
                return self._parts(folder, layout)
        raise UserError(
            f"{folder}: no {self.title}; it must hold transformer/config.json (*-Diffusers layout) "
            "or config.json (original layout)"
        )

    def holds(self, name: str) -> bool:
        """Return whether there is a folder of that name that holds a model."""
        try:
            self.find_in(Path(name).expanduser())
        except UserError:
            return False
        return True

    def is_whole(self, folder: Path) -> bool:
        """Return whether no file of a model is missing."""
        try:
            found = self.find_in(folder)
            tokenizer_files(found.tokenizer)
            for part in (found.vae, found.text_encoder, found.image_encoder):
                if part is not None and part.is_dir():
                    read_model_config(part / "config.json")
                    find_shards(part)
        except UserError:
            return False
        return True

    def _patterns(self, repository: str) -> list[str] | None:
        return list(self.files) if self.files and repository == self.real else None

    def _hub_id(self, place: str | Path) -> str:
        if not HUB_ID.fullmatch(str(place)):
            raise UserError(
                f"{place}: no such folder; give a {self.noun}'s folder or a hub id ORG/NAME"
            )
        return str(place)

    def _parts(self, folder: Path, layout: Layout) -> WanFolder:
        def part(name: str) -> Path:
            path = folder / PARTS[layout][name]
            if not path.exists():
                raise UserError(
                    f"{path}: is missing; the {self.noun} is not complete, download it again"
                )
            return path

        path = part("config")
        if layout == "diffusers":
            config = read_diffusers(path, text_len=text_len(part("tokenizer")))
        else:
            config = read_original(path)
        is_i2v = self.has_dit and config.model_type == "i2v"
        files = find_shards(part("dit")) if self.has_dit else ()
        return WanFolder(
            folder=folder,
            dit=DiTFiles(config, files, layout),
            vae=part("vae"),
            text_encoder=part("text_encoder"),
            tokenizer=part("tokenizer"),
            image_encoder=part("image_encoder") if is_i2v else None,
        )
