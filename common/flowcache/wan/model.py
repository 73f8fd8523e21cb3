"""What all models on Wan's backbone have in common of a `flowcache.runtime.model.VideoModel`."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.runtime.checks import check_finite
from flowcache.runtime.cli import choose_dtype
from flowcache.runtime.compile import should_compile
from flowcache.runtime.hub import Missing
from flowcache.runtime.model import Job, Source, VideoModel
from flowcache.runtime.video import to_pixels
from flowcache.wan import text, vae
from flowcache.wan.dit import DiT, DiTConfig, compiled_parts
from flowcache.wan.folder import Folders, WanFolder
from flowcache.wan.given import Conditioning, Media, read_media
from flowcache.wan.memory import Held, WanMemory, networks_of

SAME_KEYS: Mapping[str, str] = MappingProxyType(
    {
        key: key
        for key in (
            *("prompt", "image", "video", "seed", "memory_limit", "embedding_cache"),
            *("num_steps", "num_frames", "height", "width", "fps", "guidance"),
        )
    }
)
"""Arguments of the command line that are settings of the same name."""


class WanModel(VideoModel):
    """Files, text encoder, VAE, memory, compiling; settings as in Wan models."""

    keys: Mapping[str, str] = SAME_KEYS
    on_host: Mapping[str, tuple[str, Any]] = MappingProxyType(
        {
            "text_on_host": ("text_on_host", True),
            "dit_aside": ("offload", True),
            "kv_on_host": ("kv_on_host", True),
        }
    )
    amounts: Collection[str] = ("blocks_on_device", "vae_strips")

    folders: Folders
    """Where its checkpoints are found."""

    # Files and settings -----------------------------------------------------------------------

    def sizes_of(self, name: str) -> DiTConfig | None:
        """Return the sizes of a released model, by its name or hub id; None: not known."""
        raise NotImplementedError

    def held(self, job: Job) -> Held:
        """Return what the model's loop keeps in memory."""
        raise NotImplementedError

    def find(self, name: str, *, is_dry: bool = False, download: bool = False) -> Source:
        if is_dry and name in self.folders.released:
            return Source(name, plans_by_sizes=True, sizes=self.sizes_of(name))
        place = self.folders.choose(name)
        if Path(place).exists():
            return source_of(self.folders.find(place))
        return Source(place, sizes=self.sizes_of(place))

    def missing(self, config: Any, source: Source) -> Missing | None:
        if source.folder is not None or source.plans_by_sizes:
            return None
        missing = self.folders.find_download(source.name)
        if missing is not None and source.sizes is None:
            raise UserError(
                f"{missing.describe()}: is not downloaded in a dry run, and its sizes are not "
                f"known: give --model as one of {', '.join(self.folders.released)}, or run without "
                "--dry-run"
            )
        return missing

    def fetch(self, config: Any, source: Source) -> tuple[Any, Source]:
        return config, source if source.files else source_of(self.folders.find(source.name))

    def check_files(self, config: Any, source: Source) -> None:
        source.files.check()

    def fingerprint(self, source: Source) -> str:
        return source.files.dit.fingerprint()

    def dtype(self, config: Any, device: torch.device) -> torch.dtype:
        return choose_dtype(config.dtype, device)

    def footprint(self, job: Job, *, overlaps: bool) -> WanMemory:
        sizes = job.source.sizes
        return WanMemory(
            sizes,
            self.held(job),
            job.config,
            job.work,
            networks=networks_of(
                job.source.files, sizes, dtype=job.dtype, vae_dtype=vae_dtype(job.config)
            ),
            dtype=job.dtype,
            layout=job.ranks.layout,
            overlaps=overlaps,
        )

    def ingredients(self, job: Job) -> dict[str, Path]:
        files = job.source.files
        parts = ("vae", "text_encoder", "tokenizer", "image_encoder")
        return {name: path for name in parts if (path := getattr(files, name)) is not None}

    # Running ----------------------------------------------------------------------------------

    def prompts(self, job: Job) -> list[str]:
        """Return the texts that are encoded: those of the branches, then others."""
        return [job.config.prompt, job.config.negative_prompt][: len(job.work.branches)]

    def text_facts(self, job: Job) -> dict[str, Any]:
        folder = job.source.files
        return {
            "prompts": self.prompts(job),
            "encoder": text.fingerprint(folder.text_encoder, tokenizer=folder.tokenizer),
            "text_len": folder.config.text_len,
            "dtype": str(job.dtype),
        }

    def load_text(self, job: Job) -> text.TextEncoder:
        return job.source.files.load_text(dtype=job.dtype, device=job.text_device)

    def encode_text(self, job: Job, encoder: text.TextEncoder) -> Tensor:
        made = encoder.encode(self.prompts(job))
        modules = {"text encoder": encoder.model}
        return check_finite(made, "the embeddings of the prompts", modules=modules)

    def blocks(self, dit: DiT) -> Sequence[nn.Module]:
        return list(dit.blocks)

    def compile(self, job: Job, dit: DiT) -> None:
        dit.parts, work = compiled_parts(), job.work
        dit.compile_ahead(
            num_frames=work.pass_tokens // work.frame_tokens,
            frame_tokens=work.frame_tokens // job.ranks.layout.sequence,
            batches=[1],
        )

    def media(self, config: Any, source: Source) -> Media:
        return read_media(config)

    def before(self, media: Media) -> Tensor | None:
        return media.video

    def inputs(self, job: Job, encoded: Tensor) -> Conditioning:
        media, history, video = job.media, job.config.overlap_history, None
        if media.video is not None and history is not None:
            video = to_pixels(media.video[-history:]).to(job.device)
        texts, count = encoded.split(1), len(job.work.branches)
        return Conditioning(
            dict(zip(job.work.branches, texts[:count], strict=True)),
            image_features=self._image_features(job),
            image=media.image,
            end_image=media.end_image,
            video=video,
            scenes=texts[count:],
        )

    def _image_features(self, job: Job) -> Tensor | None:
        """Return what CLIP sees in the start image; None for models without."""
        path, image = job.source.files.image_encoder, job.media.image
        if path is None or image is None:
            return None
        vision = text.load_vision(path, dtype=job.dtype, device=job.device)
        return check_finite(
            vision.encode(image.movedim(1, 0)),
            "the features of the start image",
            modules={"image encoder": vision.model},
        )

    def load_vae(self, job: Job) -> vae.VAE:
        config, device = job.config, job.device
        made = vae.load(job.source.files.vae, dtype=vae_dtype(config), device=device)
        made.num_strips = job.residence.vae_strips or 1
        compiles = config.vae_compile and should_compile(True, device)
        return made.quicken(compiles=compiles) if compiles or made.dtype != torch.float32 else made


def vae_dtype(config: Any) -> torch.dtype:
    """Return the type of the VAE's weights."""
    return torch.bfloat16 if config.vae_dtype == "bfloat16" else torch.float32


def source_of(found: WanFolder) -> Source:
    """Return a model that was found."""
    return Source(found.folder.name, found.folder, files=found, sizes=found.config)
