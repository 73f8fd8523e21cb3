"""SkyReels-V2's methods: full and causal attention, each reuse rule with two predictors."""

from functools import partial

from flowcache.bench.methods import REFERENCE, Comparison, Method, with_predictors
from flowcache.tuning.runs import Words

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


_pair = partial(with_predictors, base=CAUSAL, predictors={"residual": (), "velocity + 0.5": BEST})
"""The published predictor, and the best one."""
_COMPUTED = (Method(REFERENCE, "vanilla"), Method(CAUSAL, "vanilla_causal"))
"""Every step is computed."""
_METHODS = (
    *_COMPUTED,
    *_pair("TeaCache-slow", "teacache_slow"),
    *_pair("TeaCache-fast", "teacache_fast"),
    *_pair("TeaCache, causal (FlowCache-fast's FLOPs)", "teacache_causal"),
    *_pair("FlowCache-slow", "flowcache_slow"),
    *_pair("FlowCache-fast", "flowcache_fast"),
    *_pair("FlowCache-slow + KV compression", "flowcache_kvcompress"),
    *_pair("stride (FlowCache-fast's FLOPs)", "stride"),
)
COMPARISON = Comparison(
    _METHODS,
    base_label="causal",
    computed=_COMPUTED,
    preset="flowcache_fast",
    words=WORDS,
    has_clean=True,
    has_guidance=True,
)
