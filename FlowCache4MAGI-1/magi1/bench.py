"""MAGI-1 in tuning: what its settings call what every model has."""

from flowcache.tune.runs import Words

WORDS = Words(
    content=(),
    published="latent_update",
    whole_window="teacache_no_passes",
    demo_frames=96,
    token_elements=64,
)
