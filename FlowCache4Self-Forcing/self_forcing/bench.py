"""Self-Forcing's methods: many steps with reuse, few steps with fewer passes, long videos."""

from functools import partial

from flowcache.bench.methods import REFERENCE, Comparison, Method, with_predictors
from flowcache.tuning.runs import Words

WORDS = Words(
    content=("reuse.signal=content",),
    published="residual",
    whole_window="ar_teacache",
    demo_frames=45,
    token_elements=64,
    preset="ar_flowcache_fast",
)
_pair = partial(
    with_predictors,
    base=REFERENCE,
    predictors={"residual": (), "velocity": ("reuse.predict=velocity",)},
)
FEW = "few steps"
_few = partial(Method, preset="self_forcing", base=FEW)
_METHODS = (
    Method(REFERENCE, "ar_chunkwise"),
    *_pair("TeaCache", "ar_teacache"),
    *_pair("FlowCache-slow", "ar_flowcache_slow"),
    *_pair("FlowCache-fast", "ar_flowcache_fast"),
    Method(FEW, "self_forcing"),
    *(
        _few(f"{FEW}, {name}", overrides=overrides)
        for name, overrides in {
            "clean pass merged": ("clean_pass=merged",),
            "clean pass skipped": ("clean_pass=skipped",),
            "3 and a refining pass": ("step_list=[1000,750,500]", "clean_pass=refined"),
            "blocks reused": ("reuse_blocks=true",),
        }.items()
    ),
)
_long = partial(Method, preset="self_forcing")
WINDOW = ("window=12", "positions=relative")
LONG = (
    _long("all frames"),
    _long("window 21", overrides=("window=21",)),
    _long("sink 3 + window 12", overrides=("window=12", "sink=3")),
    _long("sink 3 + window 12, relative", overrides=(*WINDOW, "sink=3")),
    *(
        _long(name, overrides=(*WINDOW, f"kv.compress={name.replace(' ', '_')}"))
        for name in ("importance", "deep forcing", "density")
    ),
    # no Forcing-KV, which cuts a frame in 6 patches: the demo's has 16 tokens
    _long("dummy forcing", overrides=("positions=relative", "kv.compress=dummy_forcing")),
    Method("rolling", "long"),
    Method("many steps, sink 3 + window 12, relative", "ar_chunkwise", (*WINDOW, "sink=3")),
)
COMPARISON = Comparison(
    _METHODS,
    base_label="same steps",
    computed=_METHODS[:1],
    preset="ar_flowcache_fast",
    words=WORDS,
    has_clean=True,
    has_guidance=True,
    compression=("window=12", "kv.compress=importance"),
    long=LONG,
)
