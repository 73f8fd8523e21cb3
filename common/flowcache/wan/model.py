"""What all models on Wan's backbone have in common of a `flowcache.runtime.model.VideoModel`."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowcache.runtime.checks import check_finite
from flowcache.runtime.cli import choose_dtype
from flowcache.runtime.memory import Residence
from flowcache.runtime.model import Job, Source
from flowcache.wan import text, vae
from flowcache.wan.dit import DiT, compiled_parts
from flowcache.wan.folder import WanFolder


class WanModel(ABC):
    """Text encoder, VAE, compiling, and what may be kept on the host; settings as in Wan models."""

    @abstractmethod
    def folder(self, source: Source) -> WanFolder:
        """Return where the parts of a model are that was found."""

    def dtype(self, config: Any, device: torch.device) -> torch.dtype:
        return choose_dtype(config.dtype, device)

    def ingredients(self, job: Job) -> dict[str, Path]:
        folder = self.folder(job.source)
        return {part: getattr(folder, part) for part in ("vae", "text_encoder", "tokenizer")}

    def residence(self, config: Any) -> Residence:
        return Residence(config.text_on_host, config.offload, config.kv_on_host)

    def placed(self, config: Any, residence: Residence) -> Any:
        return replace(
            config,
            text_on_host=residence.text_on_host,
            offload=residence.dit_aside,
            kv_on_host=residence.kv_on_host,
        )

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

    def load_vae(self, job: Job) -> vae.VAE:
        return vae.load(self.folder(job.source).vae, device=job.device)


def _prompts(job: Job) -> list[str]:
    return [job.config.prompt, job.config.negative_prompt][: len(job.work.branches)]
