"""What SkyReels-V2's loop keeps in memory, in addition to what all Wan models do."""

from flowcache.runtime.memory import PIXEL_BYTES
from flowcache.runtime.model import Work
from flowcache.wan.dit import DiTConfig
from flowcache.wan.memory import Held
from flowcache.wan.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE
from skyreels_v2.config import RunConfig
from skyreels_v2.window import pixel_frames

LATENT_COPIES = 9
"""Float32 arrays of a window's size: noise, latents, the tick's copy, the solver's two velocities
and last sample, the velocities of two branches and their guided sum."""


def held_of(config: RunConfig, work: Work, sizes: DiTConfig) -> Held:
    """Count for a transformer of such sizes."""
    largest = max(work.segments, key=lambda part: part.cut.num_frames)
    num_frames, pixels = largest.cut.num_frames, config.height * config.width
    latents = LATENT_COPIES * 4 * sizes.out_dim * num_frames * pixels // SPATIAL_STRIDE**2
    rope = work.frame_tokens * num_frames * sizes.head_width * 4
    shown = (config.overlap_history or 0) * pixels * PIXEL_BYTES
    # the frames of all chunks that become clean together
    finishing = max(
        sum(len(largest.cut.chunks[chunk]) for chunk in tick.finishing) for tick in largest.ticks
    )
    return Held(
        latent_bytes=latents + rope + shown,
        encoded_frames=_encoded_frames(config, work, sizes, num_frames=num_frames),
        shown_frames=TEMPORAL_STRIDE * finishing,
        kv_remedy="set kv.compress=importance, or fewer num_frames",
        chunk_key="causal_block_size",
        window_frames=num_frames,
        is_batched=work.loop.sampling.batch_branches,
        keeps_residual=True,
    )


def _encoded_frames(config: RunConfig, work: Work, sizes: DiTConfig, *, num_frames: int) -> int:
    frames = [0, config.image is not None or config.end_image is not None]
    if sizes.model_type == "i2v" and config.image is not None:
        frames.append(pixel_frames(num_frames))
    if config.video is not None or len(work.segments) > 1:
        frames.append(config.overlap_history or 1)
    return int(max(frames))
