"""TeaCache's calibrated polynomials for the released models.

A polynomial maps the relative change of a signal to the change of the model's output to expect.
They were fitted on Wan 2.1, whose T2V polynomials the diffusion forcing and T2V models
of SkyReels-V2 share.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from flowcache.errors import UserError
from flowcache.policies import Rescale, ReusePolicy, identity, polynomial
from flowcache.runtime import profile
from flowcache.wan.dit import DiTConfig
from skyreels_v2.config import RunConfig, Signal

COEFFICIENTS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "t2v-1.3b-ret": (
            -5.21862437e04,
            9.23041404e03,
            -5.28275948e02,
            1.36987616e01,
            -4.99875664e-02,
        ),
        "t2v-14b-ret": (
            -3.03318725e05,
            4.90537029e04,
            -2.65530556e03,
            5.87365115e01,
            -3.15583525e-01,
        ),
        "t2v-1.3b": (
            2.39676752e03,
            -1.31110545e03,
            2.01331979e02,
            -8.29855975e00,
            1.37887774e-01,
        ),
        "t2v-14b": (
            -5784.54975374,
            5449.50911966,
            -1811.16591783,
            256.27178429,
            -13.02252404,
        ),
        "i2v-540p-ret": (
            2.57151496e05,
            -3.54229917e04,
            1.40286849e03,
            -1.35890334e01,
            1.32517977e-01,
        ),
        "i2v-720p-ret": (
            8.10705460e03,
            2.13393892e03,
            -3.72934672e02,
            1.66203073e01,
            -4.17769401e-02,
        ),
        "i2v-540p": (
            -3.02331670e02,
            2.23948934e02,
            -5.25463970e01,
            5.87348440e00,
            -2.01973289e-01,
        ),
        "i2v-720p": (
            -114.36346466,
            65.26524496,
            -18.82220707,
            4.91518089,
            -0.23412683,
        ),
    }
)
"""Name -> coefficients, highest power first. `-ret` belongs to the signal "timestep" (upstream's
`--use_ret_steps`), the others to "timestep_embedding".

Source: TeaCache (arXiv 2411.19108), as shipped with SkyReels-V2."""

_SIZES = {1536: "1.3b", 5120: "14b"}
"""Model width -> size of the released models."""
_RESOLUTIONS = {"540p": 544 * 960, "720p": 720 * 1280}
"""Name -> pixels of a frame."""


def coefficients_for(config: DiTConfig, *, signal: Signal, height: int, width: int) -> str | None:
    """Return the name of the polynomial that was fitted for a model, or None if none was.

    It depends on the size for models without a start image, and on the resolution (the nearer one)
    for models with one.

    Args:
        height: pixels.
        width: pixels.
    """
    size = _SIZES.get(config.dim)
    if size is None or signal == "content":
        return None
    ending = "-ret" if signal == "timestep" else ""
    if config.model_type == "t2v":
        return f"t2v-{size}{ending}"
    nearest = min(_RESOLUTIONS, key=lambda name: abs(_RESOLUTIONS[name] - height * width))
    return f"i2v-{nearest}{ending}"


def rescale_for(config: RunConfig, dit: DiTConfig) -> tuple[str, Rescale]:
    """Return the name and the function that turn a distance into what is accumulated.

    Raises:
        UserError: no coefficients are known for this model, or the name is unknown.
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


def policy_maker(config: RunConfig, dit: DiTConfig) -> Callable[[], ReusePolicy]:
    """Return what makes the reuse policy of one branch of one window."""
    if not config.reuse.kind.takes("rescale"):
        return profile.policy_maker(config.reuse)
    _, rescale = rescale_for(config, dit)
    return profile.policy_maker(config.reuse, rescale=rescale)
