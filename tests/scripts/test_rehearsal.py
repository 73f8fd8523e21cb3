"""Both models at their real widths on fake CUDA tensors: two layers, few ticks."""

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flowcache.attention import choose_kernel
from flowcache.gpu.benchmark import load_benchmark
from flowcache.gpu.fake_cuda import CUDA, Ledger, pretended_cuda
from flowcache.gpu.rehearsal import FRAMES, KERNEL, Case, LedgerStats, Rehearsed, rehearse
from flowcache.runtime.config import parse_limit
from flowcache.runtime.ending import Place
from flowcache.runtime.model import Request, load_model
from flowcache.runtime.parallel import Group, Ranks
from flowcache.runtime.run import bring_to_device, job_of, plan_memory, read_settings
from flowcache.runtime.video import to_uint8
from flowcache.wan.dit import DiT
from flowcache.wan.given import Conditioning
from flowcache.wan.vae import VAE, released

TOLERANCE = 0.15
"""Of the memory plan."""
SHORT: dict[str, tuple[str, ...]] = {
    "skyreels_v2": ("num_frames=57", "base_num_frames=57", "num_steps=5", "ar_step=1"),
    "magi1": ("runtime_config.num_frames=96", "runtime_config.num_steps=4"),
}
SIX_CHUNKS = "runtime_config.num_frames=144"
"""More than the compressed cache of MAGI-1 holds."""
DIT = ("dit", "caching", "other")
"""Stages whose FLOPs our own count covers: all but the VAE and the products of KV compression."""
LAYERS = {"skyreels_v2": "wan/dit.py:", "magi1": "magi1/dit.py:"}
"""File of a model's layers."""
UPCASTS = {
    "skyreels_v2": {"add_gated": 2, "between_attentions": 1, "after_attention": 1},
    "magi1": {"project": 2, "add_gated": 3},
}
"""Large 16-bit tensors that a layer writes once more in float32, uncompiled, by function."""
OTHER_UPCASTS = {"skyreels_v2": {"forward", "modulate"}, "magi1": {"forward"}}
"""Functions in which not only layers do so: norms (of prompts, too), modulation (of the head)."""


def case(model: str, method: str, *settings: str, num_layers: int = 2, processes: int = 1) -> Case:
    found = next(each for each in load_benchmark(model).methods if each.name == method)
    ranks = Ranks(Place(0, processes))
    return Case(model, found, num_layers=num_layers, settings=SHORT[model] + settings, ranks=ranks)


SKYREELS, MAGI = "skyreels_v2", "magi1"
CASES: dict[str, Case] = {
    "skyreels fast": case(SKYREELS, "FlowCache-fast"),
    "magi fast": case(MAGI, "FlowCache-fast + KV compression", SIX_CHUNKS),
}
SLOW: dict[str, Case] = {
    "skyreels vanilla": case(SKYREELS, "vanilla"),
    "skyreels compression": case(SKYREELS, "FlowCache-slow + KV compression"),
    "skyreels segments": case(SKYREELS, "FlowCache-fast", "num_frames=73", "overlap_history=17"),
    "skyreels keys on the host": case(SKYREELS, "FlowCache-fast", "kv_on_host=true"),
    "skyreels offload": case(SKYREELS, "FlowCache-fast", "offload=true"),
    "skyreels two branch ranks": case(SKYREELS, "FlowCache-fast", "parallel.branch=2", processes=2),
    "skyreels two token ranks": case(
        SKYREELS, "FlowCache-fast", "parallel.sequence=2", processes=2
    ),
    "magi vanilla": case(MAGI, "vanilla"),
    "magi keys on the host": case(MAGI, "FlowCache-fast", "engine_config.kv_offload=true"),
    "magi offload": case(MAGI, "FlowCache-fast", "offload=true"),
    "magi 8-bit": case(MAGI, "FlowCache-fast", "engine_config.fp8_quant=true", num_layers=3),
    "magi two token ranks": case(MAGI, "FlowCache-fast", "parallel.sequence=2", processes=2),
}
every = pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


@functools.cache
def rehearsed(name: str) -> Rehearsed:
    """Rehearse a case once for all tests of this file."""
    made = (CASES | SLOW)[name]
    size = made.ranks.place.size
    if size == 1:
        return rehearse(made)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        group = Group(0, size, dist.group.WORLD)
        divided = "branches" if made.job.ranks.layout.branch > 1 else "sequence"
        ranks = Ranks(Place(0, size), world=group, **{divided: group})
        return rehearse(replace(made, ranks=ranks))
    finally:
        dist.destroy_process_group()


def num_deciding(made: Case) -> int:
    """Return how many policies compare signals, of those that this process asks."""
    if made.method.speed is None:
        return 0
    return len(made.job.work.branches) // made.job.ranks.layout.branch


@every
def test_torch_counts_the_flops_that_we_count(name: str):
    made, run = (CASES | SLOW)[name], rehearsed(name)
    counted, own = run.ledger.total(*DIT).flops, run.stats.computed_flops
    assert counted > 1e12
    if made.job.ranks.layout.sequence == 1:
        assert counted == own
        return
    # embeddings, gates and the prompt are each process's own work; the fake group adds nothing up,
    # so that SkyReels-V2's count is half already
    whole = own * (2 if made.model == SKYREELS else 1)
    assert whole / 2 < counted < 1.01 * whole / 2


def test_only_compression_has_products_beyond_our_count():
    for name in CASES:
        total = rehearsed(name).ledger.costs["kv_compression"].flops
        assert (total > 0) == ("compress" in CASES[name].method.name.lower())


@every
def test_the_host_reads_once_per_deciding_policy_and_tick(name: str):
    made, run = (CASES | SLOW)[name], rehearsed(name)
    most = num_deciding(made)
    assert max(step.reads for step in run.steps) == most
    places = {site.place for site in run.ledger.reads}
    assert places == ({"flowcache/policies.py:relative_l1"} if most else set())


@every
def test_nothing_is_copied_in_the_way_of_the_host_but_finished_frames(name: str):
    run = rehearsed(name)
    shown = sum(bool(step.tick.finishing) for step in run.steps)
    assert run.ledger.waits_in(FRAMES) == shown
    for stage in ("dit", "caching", "kv_compression", "vae"):
        assert run.ledger.waits_in(stage) == 0, run.ledger.waits


@every
def test_the_peak_is_as_planned(name: str):
    run = rehearsed(name)
    assert run.planned_bytes == pytest.approx(run.ledger.peak_bytes, rel=TOLERANCE)


@every
def test_a_layer_widens_no_more_large_tensors_than_it_did(name: str):
    made, run = (CASES | SLOW)[name], rehearsed(name)
    attention = "_scaled_dot_product_flash_attention"
    # self-attention and cross-attention
    passes = sum(c.launches for p, c in run.ledger.products.items() if p[:2] == ("dit", attention))
    file, found = LAYERS[made.model], {}
    for site, count in run.ledger.upcasts.items():
        if site.place.startswith(file):
            found[site.place.removeprefix(file)] = count / (passes / 2)
    for place in OTHER_UPCASTS[made.model]:
        found.pop(place)
    expected = dict(UPCASTS[made.model])
    if "8-bit" in name:  # one layer of three, whose joined attentions are not float32 yet
        expected["add_gated"] += 1 / 3
    assert found == pytest.approx(expected)


@every
def test_large_products_are_not_made_in_float32(name: str):
    products = rehearsed(name).ledger.products
    own = {p: c.flops for p, c in products.items() if p.stage in DIT}
    wide = sum(flops for p, flops in own.items() if p.dtype == torch.float32)
    # what is left: the head, patch and time embeddings
    assert wide < 0.005 * sum(own.values())


@every
def test_reuse_saves_operations(name: str):
    made, run = (CASES | SLOW)[name], rehearsed(name)
    assert (run.stats.num_reused > 0) == (made.method.speed is not None)
    assert run.stats.num_computed > 0


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("mode", ["int8_weight", "fp8_weight", "int8_dynamic"])
@pytest.mark.parametrize("name", [SKYREELS, MAGI])
def test_quantised_linears_run_and_fit_the_plan(name: str, mode: str):
    run = rehearse(case(name, "FlowCache-fast", f"quantize={mode}"))
    assert run.planned_bytes == pytest.approx(run.ledger.peak_bytes, rel=0.05)
    # where the transformer has the peak, its widened weights and 32-bit sums count
    assert run.ledger.peak_stage == {SKYREELS: "vae", MAGI: "dit"}[name]
    assert max(step.reads for step in run.steps) <= 2


# The table ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_layer_more_adds_the_same(name: str):
    two, three, four = (rehearse(CASES[name].with_layers(number)) for number in (2, 3, 4))
    for figure in (
        lambda run: run.dit.launches,
        lambda run: run.dit.num_bytes,
        lambda run: run.dit.flops,
        lambda run: run.stats.computed_flops,
        lambda run: run.ledger.costs["kv_compression"].flops,
        lambda run: run.ledger.peak_bytes,
        lambda run: run.planned_bytes,
    ):
        assert figure(four) - figure(three) == figure(three) - figure(two)


@pytest.mark.slow
def test_a_row_has_the_counts_of_all_layers():
    made = replace(CASES["skyreels fast"], num_layers=None)
    script = importlib.import_module("rehearse_gpu")
    row = script.row_of(made)
    assert row.flops == row.own_flops
    assert (row.num_ticks, row.reads) == (len(made.job.work.segments[0].ticks), 2)
    name, *cells = script.line("fast", row).strip("|").split("|")
    assert (name.strip(), cells[0].strip()) == ("fast", str(row.num_ticks))
    assert len(cells) + 1 == script.HEAD.strip("| ").count("|") + 1


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]):
    assert (
        importlib.import_module("rehearse_gpu").main(
            ["--architecture", "magi1", "--methods", "faster"]
        )
        == 2
    )
    assert "'faster' is unknown: use FlowCache-fast" in capsys.readouterr().err


# The rehearsal itself -----------------------------------------------------------------------------


def entered(work: Callable[[], object]) -> Ledger:
    with pretended_cuda() as ledger, ledger.stage("here"):
        work()
    return ledger


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=CUDA)


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda: half(3).sum().item(), "reads"),
        (lambda: half(3).tolist(), "reads"),
        (lambda: bool(half(1) > 0), "reads"),
        (lambda: torch.ones(3).to(CUDA), "waits"),
        (lambda: torch.ones(3).to(CUDA, non_blocking=True), "waits"),
        (lambda: torch.tensor([1.0], device=CUDA), "waits"),
        (lambda: half(3).cpu(), "waits"),
        (lambda: torch.empty(3).copy_(half(3)), "waits"),
        (lambda: torch.tensor([1.0], pin_memory=True).to(CUDA, non_blocking=True), "copies"),
        (
            lambda: torch.empty(3, pin_memory=True).copy_(half(3), non_blocking=True),
            "copies",
        ),
        (lambda: half(1024, 1024).float(), "upcasts"),
    ],
)
def test_the_ledger_shows_a_fault(work: Callable[[], object], found: str):
    ledger = entered(work)
    shown = {
        name: sum(getattr(ledger, name).values())
        for name in ("reads", "waits", "copies", "upcasts")
    }
    assert shown.pop(found) == 1
    assert not any(shown.values()), shown


def test_the_ledger_counts_launches_bytes_and_memory():
    def work() -> None:
        a = half(1000, 1000)
        b = a @ a
        a.view(-1)[:5].add_(1)
        del b
        half(500, 1000)

    ledger = entered(work)
    cost = ledger.costs["here"]
    assert cost.launches == 2
    assert cost.flops == 2 * 1000**3
    assert cost.num_bytes == 2 * (3 * 1000**2 + 2 * 5)
    assert ledger.peak_bytes == 2 * 2 * 1000**2
    assert ledger.live_bytes == 0


def test_what_concerns_the_host_alone_stays_real():
    def work() -> None:
        assert torch.linspace(0, 1, 3).tolist() == [0.0, 0.5, 1.0]
        assert math.isclose(torch.ones(3).sum().item(), 3.0)

    assert not entered(work).reads


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match="device"):
        entered(lambda: half(3) + torch.ones(3))
    with pytest.raises(RuntimeError, match="mm of tensors of one dtype"):
        entered(lambda: half(3, 3) @ torch.empty(3, 3, device=CUDA))


@pytest.fixture
def before() -> Iterator[None]:
    """Check that what is pretended is gone afterwards."""
    kept: dict[str, Any] = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
    generator = torch.Generator
    yield
    assert {name: getattr(torch.cuda, name) for name in dir(torch.cuda)} == kept
    assert torch.Generator is generator
    assert type(torch.ones(1)) is torch.Tensor
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.ones(1, device=CUDA)


@pytest.mark.usefixtures("before")
def test_nothing_is_pretended_afterwards():
    entered(lambda: half(3))


@pytest.mark.usefixtures("before")
def test_nothing_is_pretended_after_an_error():
    with pytest.raises(ZeroDivisionError):
        entered(lambda: 1 / 0)


# Limits -------------------------------------------------------------------------------------------

LIMITS = {
    "skyreels fast": (case(SKYREELS, "FlowCache-fast", num_layers=8), "5.2GB", 4),
    "magi fast": (case(MAGI, "FlowCache-fast", num_layers=8), "4.6GB", None),
}
"""Runs of some layers, a limit, and the strips in which pictures are then decoded."""
LIMIT_OF_SELF_FORCING = 3_800_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_holds(name: str):
    made, limit, num_strips = LIMITS[name]
    limit_bytes = parse_limit(limit)
    assert limit_bytes is not None
    run = rehearse(made, limit_bytes=limit_bytes)
    residence = run.memory.residence
    assert residence.vae_strips == num_strips
    assert residence.blocks_on_device is not None
    assert residence.blocks_on_device < made.benchmark.num_layers(made.job)
    assert run.planned_bytes <= run.memory.peak_bytes <= limit_bytes
    assert run.ledger.peak_bytes <= limit_bytes
    # more blocks save time where they have room
    assert run.ledger.peak_bytes >= 0.85 * limit_bytes
    # copies of blocks and keys keep nobody waiting
    for stage in ("dit", "caching", "kv_compression", "vae"):
        assert run.ledger.waits_in(stage) == 0, run.ledger.waits
    assert run.ledger.copies


@pytest.mark.slow
def test_a_limit_holds_for_self_forcing():
    """Some layers of Rolling Forcing at the released size, without FlowCache's benchmark."""
    model = load_model("self_forcing")
    source = model.find("wan2.1-t2v-1.3b", is_dry=True)
    source = replace(source, sizes=replace(source.sizes, num_layers=8))
    settings = ("prompt=-", "num_frames=33", "overlap=false", "compile=false", "dtype=bfloat16")
    request = Request("long", "wan2.1-t2v-1.3b", settings)
    config = read_settings(model, request, source)
    media = model.media(config, source)
    dtype, ranks = torch.bfloat16, Ranks()
    job = job_of(model, request, config, source, media, device=CUDA, dtype=dtype, ranks=ranks)
    job = replace(job, memory=plan_memory(job, limit=LIMIT_OF_SELF_FORCING))
    assert job.residence.blocks_on_device is not None
    with pretended_cuda() as ledger:
        with torch.device("meta"):
            dit = DiT(source.sizes).to(job.dtype)
        dit.to_empty(device=job.dit_device).eval().requires_grad_(False)
        bring_to_device(job, dit)
        dit.kernel = dit.cross_kernel = choose_kernel(CUDA, dtype=job.dtype, wanted=KERNEL)
        vae = released()
        vae.model.to_empty(device=CUDA).eval().requires_grad_(False)
        vae = VAE(vae.model)
        vae.num_strips = job.residence.vae_strips or 1
        prompt = torch.empty(1, source.sizes.text_len, source.sizes.text_dim, device=CUDA)
        inputs = Conditioning({"cond": prompt.to(job.dtype)})
        stats = LedgerStats(ledger)
        for shown in model.generate(dit, vae, job.placed, inputs, stats=stats, work=job.work):
            if shown.later is not None:
                to_uint8(shown.later.result().frames).cpu()
    assert 0.85 * LIMIT_OF_SELF_FORCING <= ledger.peak_bytes <= LIMIT_OF_SELF_FORCING
    planned = max(stage.peak_bytes for stage in job.memory.stages if stage.name != "text")
    assert planned == pytest.approx(ledger.peak_bytes, rel=TOLERANCE)
