"""One Euler step of a chunk, with its velocity or with what stands for it.

Axes: F latent frames, first; the rest of a latent follows.
"""

from torch import Tensor

from flowcache.predict import ResultStore, clean_estimate, velocity_to
from magi1.sampling import Quantity


def euler_step_(
    latents: Tensor,
    velocity: Tensor | None,
    *,
    chunk: int,
    t: float,
    step_size: float,
    results: ResultStore,
    quantity: Quantity,
) -> None:
    """Move a chunk's latents in place, and store what later steps reuse.

    Args:
        latents: `[F, ...]`.
        velocity: data minus noise, like `latents`; None: the step was not computed.
        t: timestep, 0 noise to 1 clean.
        step_size: to the next timestep.
        results: from which the change is made where there is no velocity.
    """
    sigma = latents.new_full((len(latents),), 1 - t)
    if velocity is None:
        latents += _predicted(
            latents, results.predict(chunk, sigma=sigma), sigma, step_size, quantity
        )
        return
    change = velocity * step_size
    if quantity == "clean":
        # the stored estimate follows the sign of `clean_estimate`: noise minus data
        results.put(chunk, clean_estimate(latents, -velocity, sigma=sigma), sigma=sigma)
    else:
        results.put(chunk, velocity if quantity == "velocity" else change, sigma=sigma)
    latents += change


def _predicted(
    latents: Tensor, result: Tensor, sigma: Tensor, step_size: float, quantity: Quantity
) -> Tensor:
    """Return the change of the latents that a result predicts."""
    if quantity == "latent_update":
        return result
    velocity = result
    if quantity == "clean":
        velocity = -velocity_to(result, latents, sigma=sigma)
    return velocity * step_size
