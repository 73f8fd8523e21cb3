"""SkyReels-V2's methods: full and causal attention, each reuse rule with two predictors."""

from dataclasses import replace

from benchmark.family import REFERENCE, Family, Method, Source
from benchmark.reuse import Rivals
from flowcache.runtime.model import Job, Loaded, Request
from flowcache.runtime.run import Clip, collect, encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from skyreels_v2.bench import WORDS
from skyreels_v2.model import MODEL

CAUSAL = "vanilla-causal"
BEST = ("reuse.predict=velocity", "reuse.extrapolate=0.5")
"""The predictor that serves best on the demo, beside the published one (block residual)."""


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


def prepare_method(method: Method, source: Source) -> Job:
    """Check a method's settings."""
    overrides = source.overrides(method)
    request = Request(method.preset, source.checkpoint, overrides, str(source.folder))
    return prepare(MODEL, request)


def load(job: Job) -> Loaded:
    """Load transformer and VAE."""
    return load_networks(job, stats=RunStats(job.device))


def render(job: Job, models: Loaded, prompt: str, seed: int) -> Clip:
    """Make a clip in memory."""
    job = replace(job, config=replace(job.config, prompt=prompt, seed=seed))
    stats = RunStats(job.device)
    inputs = encode_inputs(job, stats=stats)
    return collect(
        MODEL.generate(models.dit, models.vae, job.config, inputs, stats=stats, work=job.work),
        stats,
    )


RIVALS = Rivals(COMPUTED, "flowcache_fast", WORDS, has_clean=True, has_guidance=True)
FAMILY = Family(METHODS, base_label="causal", prepare=prepare_method, load=load, render=render)
