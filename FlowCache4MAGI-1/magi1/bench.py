"""MAGI-1's methods: which passes are made, what is reused and how, with and without compression.

Every row that reuses is compared twice: with vanilla, and with a row of the same passes and the
same KV cache that computes every step. The first comparison mixes what reuse, left-out passes and
compression do; the second one shows reuse alone.
"""

from functools import partial

from flowcache.bench.methods import REFERENCE, Comparison, Method, with_predictors
from flowcache.tuning.runs import Words

WORDS = Words(
    content=(),
    published="latent_update",
    whole_window="teacache_no_passes",
    demo_frames=96,
    token_elements=64,
)
COMPRESSION = ("kv.compress=importance", "kv.queries=frame", "kv.order=score")
"""KV compression as in the published presets, `configs/flowcache_*.yaml`."""
VELOCITY = ("reuse.predict=velocity",)
NO_CLEAN, NEITHER = f"{REFERENCE}, no clean pass", f"{REFERENCE}, neither pass"
NO_CLEAN_PASS = ("passes.clean_pass=false",)


def with_compression(method: Method) -> Method:
    """Return a method whose KV cache is compressed, compared with its base of the same cache."""
    suffix = " + KV compression"
    return Method(
        method.name + suffix,
        method.preset,
        (*method.overrides, *COMPRESSION),
        None if method.base is None else method.base + suffix,
    )


_pair = partial(with_predictors, predictors={"latent update": (), "velocity": VELOCITY})
"""The published predictor, and the velocity."""
_COMPUTED = (
    Method(REFERENCE, "vanilla"),
    Method(f"{REFERENCE}, KV window", "vanilla_window"),
    Method(f"{REFERENCE}, no nearly-clean pass", "vanilla_no_nearly_clean"),
    Method(NO_CLEAN, "vanilla", NO_CLEAN_PASS),
    Method(NEITHER, "vanilla_no_nearly_clean", NO_CLEAN_PASS),
)
"""Every step is computed."""
REUSED = (
    *_pair("TeaCache-slow", "teacache_slow", base=NO_CLEAN),
    *_pair("TeaCache-fast", "teacache_fast", base=NO_CLEAN),
    *_pair("TeaCache, neither pass (FlowCache-fast's FLOPs)", "teacache_no_passes", base=NEITHER),
    *_pair("FlowCache-slow", "flowcache_slow_nocompress", base=NEITHER),
    *_pair("FlowCache-fast", "flowcache_fast_nocompress", base=NEITHER),
    *_pair("stride (FlowCache-fast's FLOPs)", "stride", base=NEITHER),
)
PLAIN = (*_COMPUTED, *REUSED)
_METHODS = (*PLAIN, *map(with_compression, PLAIN))
COMPARISON = Comparison(
    _METHODS,
    base_label="no reuse",
    computed=(_COMPUTED[0], _COMPUTED[-1]),
    preset="flowcache_fast_nocompress",
    words=WORDS,
    has_clean=False,
    has_guidance=False,
    longer="raise runtime_config.num_frames, or lower runtime_config.window_size and "
    "kv.total_chunks",
)
