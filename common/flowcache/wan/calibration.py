"""What Wan models compare to decide on reuse, and TeaCache's calibrated polynomials for them.

A polynomial maps the relative change of a signal to the change of the model's output to expect.
They were fitted on Wan 2.1, whose T2V polynomials the diffusion forcing and T2V models
of SkyReels-V2 share, and the many-step models of Causal-Forcing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flowcache.errors import UserError
from flowcache.policies import (
    Policies,
    Rescale,
    ReuseRule,
    check_guidance,
    check_reuse,
    guidance_of,
    identity,
    polynomial,
)
from flowcache.predict import PREDICTORS, Quantity
from flowcache.runtime import profile

if TYPE_CHECKING:
    from flowcache.wan.dit import DiTConfig

Signal: TypeAlias = Literal["timestep", "timestep_embedding", "content"]
"""What a reuse policy compares: a tick's timestep, its embedding, or the noisy chunk itself."""


@dataclass(frozen=True)
class ReuseConfig(ReuseRule):
    """When a chunk is recomputed, and what it gets when it is not."""

    signal: Signal = "timestep"
    rescale: str = "auto"
    predict: Quantity = "residual"


def check_rule(rule: ReuseConfig, *, num_steps: int, num_passes: int) -> None:
    """Check that what a rule asks for fits the run and itself."""
    check_reuse(rule, num_steps=num_steps, least_warmup=1)
    if rule.kind.takes("distance_low") and rule.signal != "content":
        raise UserError(
            f"reuse.policy={rule.policy} compares what profiles are calibrated with: set "
            f"reuse.signal=content, not {rule.signal}"
        )
    check_guidance(rule, num_passes=num_passes)
    if guidance_of(rule).is_on and PREDICTORS[rule.predict].level == "tokens":
        raise UserError(
            "reuse.guidance_every and reuse.guidance_steps hold a difference of velocities: "
            "set reuse.predict to velocity, clean or latent_update, not residual"
        )


COEFFICIENTS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "t2v-1.3b-ret": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
        "t2v-14b-ret": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
        "t2v-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
        "t2v-14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
        "i2v-540p-ret": (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977),
        "i2v-720p-ret": (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401),
        "i2v-540p": (-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
        "i2v-720p": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    }
)
"""Highest power first. The names that end in -ret are those of signal "timestep" (upstream's
`--use_ret_steps`), the others of "timestep_embedding".

Source: TeaCache (arXiv 2411.19108), as shipped with SkyReels-V2."""

_SIZES = {1536: "1.3b", 5120: "14b"}
"""Model width -> size of the released models."""
_RESOLUTIONS = {"540p": 544 * 960, "720p": 720 * 1280}
"""Name -> pixels of a frame."""


def coefficients_for(config: DiTConfig, *, signal: Signal, height: int, width: int) -> str | None:
    """Return the name of the polynomial that was fitted for a model, or None if none was.

    It depends on the size for models without a start image, else on the (nearer) resolution.
    """
    size = _SIZES.get(config.dim)
    if size is None or signal == "content":
        return None
    ending = "-ret" if signal == "timestep" else ""
    if config.model_type == "t2v":
        return f"t2v-{size}{ending}"
    nearest = min(_RESOLUTIONS, key=lambda name: abs(_RESOLUTIONS[name] - height * width))
    return f"i2v-{nearest}{ending}"


def rescale_for(config: Any, dit: DiTConfig) -> tuple[str, Rescale]:
    """Return the name and the function that turn a distance into what is accumulated.

    Args:
        config: settings with `reuse`, `height` and `width`.
    """
    name = config.reuse.rescale
    if name == "none" or (name == "auto" and config.reuse.signal == "content"):
        return "none", identity
    if name == "auto":
        found = coefficients_for(
            dit, signal=config.reuse.signal, height=config.height, width=config.width
        )
        if found is None:
            raise UserError(
                f"reuse.policy={config.reuse.policy} has no calibrated coefficients for a model of "
                f"width {dit.dim}: set reuse.rescale=none, or to one of {', '.join(COEFFICIENTS)}"
            )
        name = found
    if name not in COEFFICIENTS:
        raise UserError(
            f"reuse.rescale={name} is unknown: use auto, none, or one of {', '.join(COEFFICIENTS)}"
        )
    return name, polynomial(COEFFICIENTS[name])


def policies_of(config: Any, dit: DiTConfig) -> Policies:
    """Return what makes the policies that the settings ask for; see `rescale_for`."""
    takes_rescale = config.reuse.kind.takes("rescale")
    rescale = rescale_for(config, dit)[1] if takes_rescale else identity
    make_policy = profile.policy_maker(config.reuse, rescale=rescale)
    return lambda *, segment, branch: make_policy()  # noqa: ARG005
