"""SkyReels-V2's methods: full and causal attention, each reuse rule with two predictors."""

from flowcache.bench.methods import REFERENCE, Comparison, Method
from flowcache.tune.runs import Words

WORDS = Words(
    content=("reuse.signal=content",),
    published="residual",
    whole_window="teacache_causal",
    demo_frames=77,
    token_elements=64,
)
CAUSAL = "vanilla-causal"
BEST = ("reuse.predict=velocity", "reuse.extrapolate=0.5")
"""The predictor that serves best on the demo; the published one is the block residual."""


def with_predictors(name: str, preset: str) -> list[Method]:
    """Return a method with the published predictor and with the best one."""
    return [
        Method(f"{name}, residual", preset, base=CAUSAL),
        Method(f"{name}, velocity + 0.5", preset, BEST, base=CAUSAL),
    ]


COMPUTED = (Method(REFERENCE, "vanilla"), Method(CAUSAL, "vanilla_causal"))
"""Every step is computed."""
METHODS = (
    *COMPUTED,
    *with_predictors("TeaCache-slow", "teacache_slow"),
    *with_predictors("TeaCache-fast", "teacache_fast"),
    *with_predictors("TeaCache, causal (FlowCache-fast's FLOPs)", "teacache_causal"),
    *with_predictors("FlowCache-slow", "flowcache_slow"),
    *with_predictors("FlowCache-fast", "flowcache_fast"),
    *with_predictors("FlowCache-slow + KV compression", "flowcache_kvcompress"),
    *with_predictors("stride (FlowCache-fast's FLOPs)", "stride"),
)
COMPARISON = Comparison(
    METHODS,
    base_label="causal",
    computed=COMPUTED,
    preset="flowcache_fast",
    words=WORDS,
    has_clean=True,
    has_guidance=True,
)
