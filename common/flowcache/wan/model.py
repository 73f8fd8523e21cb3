"""What all models on Wan's backbone have in common of a `flowcache.runtime.model.VideoModel`."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from flowcache.runtime.checks import check_finite
from flowcache.runtime.cli import choose_dtype
from flowcache.runtime.compile import should_compile
from flowcache.runtime.memory import Footprint
from flowcache.runtime.model import Job, Source, VideoModel
from flowcache.wan import text, vae
from flowcache.wan.dit import DiT, compiled_parts
from flowcache.wan.folder import WanFolder
from flowcache.wan.given import Conditioning, read_media
from flowcache.wan.memory import ChunkMemory, networks_of

SAME_KEYS: Mapping[str, str] = MappingProxyType(
    {
        key: key
        for key in (
            *("prompt", "image", "video", "seed", "memory_limit", "embedding_cache"),
            *("num_steps", "num_frames", "height", "width", "fps"),
        )
    }
)
"""Arguments of the command line that are settings of the same name."""


class WanModel(VideoModel):
    """Text encoder, VAE, compiling, and what may be kept on the host; settings as in Wan models."""

    keys: Mapping[str, str] = SAME_KEYS
    on_host: Mapping[str, tuple[str, Any]] = MappingProxyType(
        {
            "text_on_host": ("text_on_host", True),
            "dit_aside": ("offload", True),
            "kv_on_host": ("kv_on_host", True),
        }
    )

    def folder(self, source: Source) -> WanFolder:
        """Return where the parts of a model are that was found."""
        raise NotImplementedError

    def dtype(self, config: Any, device: torch.device) -> torch.dtype:
        return choose_dtype(config.dtype, device)

    def footprint(self, job: Job, *, overlaps: bool) -> Footprint:
        """Count; `given` of the media is what is encoded, `[3, T, H, W]` or None."""
        given = job.media.given
        folder = None if job.source.files is None else self.folder(job.source)
        return ChunkMemory(
            job.source.sizes,
            job.config,
            job.work,
            given_pixels=0 if given is None else given.shape[1],
            networks=networks_of(folder, dtype=job.dtype, vae_dtype=vae_dtype(job.config)),
            dtype=job.dtype,
            layout=job.ranks.layout,
            overlaps=overlaps,
        )

    def ingredients(self, job: Job) -> dict[str, Path]:
        folder = self.folder(job.source)
        return {part: getattr(folder, part) for part in ("vae", "text_encoder", "tokenizer")}

    def text_facts(self, job: Job) -> dict[str, Any]:
        folder = self.folder(job.source)
        return {
            "prompts": _prompts(job),
            "encoder": text.fingerprint(folder.text_encoder, tokenizer=folder.tokenizer),
            "text_len": folder.config.text_len,
            "dtype": str(job.dtype),
        }

    def load_text(self, job: Job) -> text.TextEncoder:
        folder = self.folder(job.source)
        return text.load_encoder(
            folder.text_encoder,
            tokenizer=folder.tokenizer,
            text_len=folder.config.text_len,
            dtype=job.dtype,
            device=job.text_device,
        )

    def encode_text(self, job: Job, encoder: text.TextEncoder) -> Tensor:
        made = encoder.encode(_prompts(job))
        modules = {"text encoder": encoder.model}
        return check_finite(made, "the embeddings of the prompts", modules=modules)

    def compile(self, job: Job, dit: DiT) -> None:
        dit.parts, work = compiled_parts(), job.work
        dit.compile_ahead(
            num_frames=work.pass_tokens // work.frame_tokens,
            frame_tokens=work.frame_tokens // job.ranks.layout.sequence,
            batches=[1],
        )

    def media(self, config: Any, source: Source) -> Any:
        return read_media(config)

    def before(self, media: Any) -> Tensor | None:
        return media.video

    def inputs(self, job: Job, encoded: Tensor) -> Any:
        texts = zip(job.work.branches, encoded.split(1), strict=True)
        return Conditioning(dict(texts), job.media.given)

    def load_vae(self, job: Job) -> vae.VAE:
        config, device = job.config, job.device
        made = vae.load(self.folder(job.source).vae, dtype=vae_dtype(config), device=device)
        compiles = config.vae_compile and should_compile(True, device)
        return made.quicken(compiles=compiles) if compiles or made.dtype != torch.float32 else made


def vae_dtype(config: Any) -> torch.dtype:
    """Return the type of the VAE's weights."""
    return torch.bfloat16 if config.vae_dtype == "bfloat16" else torch.float32


def _prompts(job: Job) -> list[str]:
    return [job.config.prompt, job.config.negative_prompt][: len(job.work.branches)]
