"""SkyReels-V2 in tuning: what its settings call what every model has."""

from flowcache.tune.runs import Words

WORDS = Words(
    content=("reuse.signal=content",),
    published="residual",
    whole_window="teacache_causal",
    demo_frames=77,
    token_elements=64,
)
