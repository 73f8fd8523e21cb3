"""MAGI-1's methods: which passes are made, what is reused and how, with and without compression.

Every row that reuses is compared twice: with vanilla, and with a row of the same passes and the
same KV cache that computes every step. The first comparison mixes what reuse, left-out passes and
compression do; the second one shows reuse alone.
"""

from flowcache.bench.methods import REFERENCE, Comparison, Method
from flowcache.tune.runs import Words

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


def with_predictors(name: str, preset: str, *, base: str) -> list[Method]:
    """Return a method that reuses the latent update, as published, and one for the velocity."""
    return [
        Method(f"{name}, latent update", preset, base=base),
        Method(f"{name}, velocity", preset, VELOCITY, base),
    ]


COMPUTED = (
    Method(REFERENCE, "vanilla"),
    Method(f"{REFERENCE}, KV window", "vanilla_window"),
    Method(f"{REFERENCE}, no nearly-clean pass", "vanilla_no_nearly_clean"),
    Method(NO_CLEAN, "vanilla", NO_CLEAN_PASS),
    Method(NEITHER, "vanilla_no_nearly_clean", NO_CLEAN_PASS),
)
"""Every step is computed."""
REUSED = (
    *with_predictors("TeaCache-slow", "teacache_slow", base=NO_CLEAN),
    *with_predictors("TeaCache-fast", "teacache_fast", base=NO_CLEAN),
    *with_predictors(
        "TeaCache, neither pass (FlowCache-fast's FLOPs)", "teacache_no_passes", base=NEITHER
    ),
    *with_predictors("FlowCache-slow", "flowcache_slow_nocompress", base=NEITHER),
    *with_predictors("FlowCache-fast", "flowcache_fast_nocompress", base=NEITHER),
    *with_predictors("stride (FlowCache-fast's FLOPs)", "stride", base=NEITHER),
)
PLAIN = (*COMPUTED, *REUSED)
METHODS = (*PLAIN, *map(with_compression, PLAIN))
COMPARISON = Comparison(
    METHODS,
    base_label="no reuse",
    computed=(COMPUTED[0], COMPUTED[-1]),
    preset="flowcache_fast_nocompress",
    words=WORDS,
    has_clean=False,
    has_guidance=False,
    longer="raise runtime_config.num_frames, or lower runtime_config.window_size and "
    "kv.total_chunks",
)
