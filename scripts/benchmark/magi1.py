"""MAGI-1's methods: which passes are made, what is reused and how, with and without compression.

Every row that reuses is compared twice: with vanilla, and with a row of the same passes and the
same KV cache that computes every step. The first comparison mixes what reuse, left-out passes and
compression do; the second one shows reuse alone.
"""

from dataclasses import replace

from benchmark.family import REFERENCE, Family, Method, Source
from benchmark.reuse import Rivals
from flowcache.errors import UserError
from flowcache.runtime.model import Job, Loaded, Request
from flowcache.runtime.run import Clip, collect, encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from magi1.bench import WORDS
from magi1.model import MODEL
from magi1.work import budget_of

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


def prepare_method(method: Method, source: Source) -> Job:
    """Check a method's settings.

    Raises:
        UserError: a method of KV compression would compress nothing.
    """
    overrides = source.overrides(method)
    request = Request(method.preset, source.checkpoint, overrides, str(source.folder))
    job = prepare(MODEL, request)
    check_compresses(method.name, job)
    return job


def load(job: Job) -> Loaded:
    """Load transformer and VAE."""
    return load_networks(job, stats=RunStats(job.device))


def render(job: Job, models: Loaded, prompt: str, seed: int) -> Clip:
    """Make a clip in memory."""
    runtime = replace(job.config.runtime_config, seed=seed)
    job = replace(job, config=replace(job.config, prompt=prompt, runtime_config=runtime))
    stats = RunStats(job.device)
    inputs = encode_inputs(job, stats=stats)
    return collect(
        MODEL.generate(models.dit, models.vae, job.config, inputs, stats=stats, work=job.work),
        stats,
    )


def check_compresses(name: str, job: Job) -> None:
    """Refuse a row about compression whose clip is so short that nothing is ever dropped.

    Raises:
        UserError: the KV cache has room for the whole clip.
    """
    budget, num_chunks = budget_of(job.config), job.work.segments[0].cut.num_chunks
    if budget is not None and num_chunks <= budget.total_chunks:
        raise UserError(
            f"{name}: nothing would be dropped, since the clip has {num_chunks} chunks and the KV "
            f"cache holds {budget.total_chunks}: raise runtime_config.num_frames, or lower "
            "runtime_config.window_size and kv.total_chunks"
        )


RIVALS = Rivals(
    (COMPUTED[0], COMPUTED[-1]),
    "flowcache_fast_nocompress",
    WORDS,
    has_clean=False,
    has_guidance=False,
)
FAMILY = Family(METHODS, base_label="no reuse", prepare=prepare_method, load=load, render=render)
