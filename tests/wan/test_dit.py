import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors import safe_open
from torch import Tensor

from flowcache.wan.dit import DiT, DiTConfig, rope_table, rotate, sinusoid

pytestmark = pytest.mark.numeric

MakeDiT = Callable[..., DiT]

GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels_v2"


def load(name: str) -> tuple[DiT, dict[str, Any], dict[str, Tensor]]:
    """Return the transformer, the settings and the tensors of a reference file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    dit = DiT(DiTConfig(**case["config"], image_dim=case.get("image_feature_dim")))
    prefix = "weights."
    dit.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    return dit.eval(), case, tensors


def inputs(dit: DiT, *, frames: int = 4, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """Return latents, timesteps and a prompt."""
    draw, config = torch.Generator().manual_seed(seed), dit.config
    return (
        torch.randn(batch, 16, frames, 4, 6, generator=draw),
        torch.randint(0, 1000, (batch, frames), generator=draw),
        torch.randn(batch, config.text_len, config.text_dim, generator=draw),
    )


@pytest.mark.parametrize("fps", [16, 24])
@pytest.mark.parametrize("form", ["full", "ar", "scalar"])
def test_forwards_with_frame_rate_equal_the_reference(form: str, fps: int):
    dit, case, stored = load("dit_t2v")
    x, num_frames, size = stored["in.x"], stored["in.x"].shape[2], case["ar_block"]
    t = stored["in.t"]
    if form == "scalar":
        t = stored["in.t_scalar"].unsqueeze(1).expand(-1, num_frames)
    bounds = [(a, a + size) for a in range(0, num_frames, size)] if form == "ar" else None
    ours = dit(x, t, stored["in.context"], fps=[fps], causal_chunks=bounds)
    expected = stored[f"out.{form}.fps{0 if fps == 16 else 1}"]
    assert_close(ours, expected, ulps=64)


@pytest.mark.parametrize(("out", "t"), [("full", "t"), ("frames", "t_frames")])
def test_forwards_with_a_start_image_equal_the_reference(out: str, t: str):
    dit, _, stored = load("dit_i2v")
    x = stored["in.x"]
    times = stored[f"in.{t}"].view(1, -1).expand(1, x.shape[2])
    ours = dit(x, times, stored["in.context"], y_BCFhw=stored["in.y"], image_BLD=stored["in.clip"])
    assert_close(ours, stored[f"out.{out}"], ulps=64)


def test_with_full_attention_every_frame_sees_every_other(make_dit: MakeDiT):
    dit = make_dit()
    x, t, text = inputs(dit)
    changed = x.clone()
    changed[:, :, -1] += 1
    difference = (dit(x, t, text) - dit(changed, t, text)).abs().amax(dim=(0, 1, 3, 4))
    assert difference.min() > 1e-6


def test_block_causal_attention_hides_later_chunks_bit_for_bit(make_dit: MakeDiT):
    dit = make_dit()
    x, t, text = inputs(dit, frames=5)
    changed, other_t = x.clone(), t.clone()
    changed[:, :, 4] += 1
    other_t[:, 4] = 7
    bounds = [(0, 2), (2, 4), (4, 5)]
    before = dit(x, t, text, causal_chunks=bounds)
    after = dit(changed, other_t, text, causal_chunks=bounds)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.allclose(before[:, :, 4], after[:, :, 4])


def test_one_chunk_of_all_frames_is_full_attention(make_dit: MakeDiT):
    dit = make_dit()
    x, t, text = inputs(dit)
    assert torch.equal(dit(x, t, text, causal_chunks=[(0, 4)]), dit(x, t, text))


def test_a_batch_equals_its_items_alone(make_dit: MakeDiT):
    dit = make_dit(inject_sample_info=True)
    x, t, text = inputs(dit, batch=2)
    both = dit(x, t, text, fps=[16, 24])
    for item, fps in enumerate((16, 24)):
        one = slice(item, item + 1)
        alone = dit(x[one], t[one], text[one], fps=[fps])
        assert_close(both[one], alone, ulps=64)


def test_the_frame_rate_matters_only_to_models_that_know_it(make_dit: MakeDiT):
    for knows, dit in ((True, make_dit(inject_sample_info=True)), (False, make_dit())):
        x, t, text = inputs(dit)
        slow, fast, faster = (dit(x, t, text, fps=[fps]) for fps in (16, 24, 30))
        assert torch.equal(slow, fast) is not knows
        assert torch.equal(fast, faster)


def test_embedding_some_frames_is_a_part_of_embedding_all(make_dit: MakeDiT):
    dit = make_dit()
    x, t, _ = inputs(dit)
    whole = dit.embed(x, t, fps=[24]).frames(1, 3)
    part = dit.embed(x[:, :, 1:3], t[:, 1:3], fps=[24])
    for name in ("tokens", "time", "modulation"):
        assert_close(getattr(part, name), getattr(whole, name), ulps=64)


def test_a_bfloat16_model_keeps_modulation_and_velocity_in_float32(make_dit: MakeDiT):
    dit = make_dit()
    x, t, text = inputs(dit)
    exact = dit(x, t, text)
    dit.to(torch.bfloat16)
    embedded = dit.embed(x, t, fps=[24])
    assert embedded.tokens.dtype == torch.bfloat16
    assert embedded.time.dtype == embedded.modulation.dtype == torch.float32
    rounded = dit(x, t, text)
    assert rounded.dtype == torch.float32
    assert_close(rounded, exact, ulps=8, dtype=torch.bfloat16)


def test_timesteps_are_embedded_cosine_first():
    embedded = sinusoid(torch.tensor([0.0, 2.0]), width=4)
    assert embedded.dtype == torch.float64
    assert embedded[0].tolist() == [1, 1, 0, 0]
    angles = torch.tensor([2.0, 2.0 / 100], dtype=torch.float64)
    assert torch.equal(embedded[1], torch.cat([angles.cos(), angles.sin()]))


def test_rotary_angles_divide_the_head_among_frame_row_and_column():
    """At width 128: 22 pairs for the frame, 21 for the row, 21 for the column."""
    table = rope_table(torch.tensor([0, 5]), height=3, width=4, head_width=128)
    assert table.shape == (2 * 3 * 4, 64, 2)
    cos, sin = table.view(2, 3, 4, 64, 2)[1, 2, 3].double().unbind(-1)
    first = torch.atan2(sin, cos)[[0, 22, 43]]  # the fastest pair of each turns by the position
    expected = torch.tensor([5.0 - 2 * torch.pi, 2.0, 3.0], dtype=torch.float64)
    assert_close(first, expected, ulps=16, dtype=torch.float32)
    assert torch.equal(table[0], torch.tensor([1.0, 0.0]).expand(64, 2))


def test_rotation_keeps_lengths_and_depends_on_the_distance_only():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 2, 12, generator=draw)

    def product(frame_q: int, frame_k: int) -> Tensor:
        table = rope_table(torch.tensor([frame_q, frame_k]), height=1, width=1, head_width=12)
        return (rotate(q, table[:1]) * rotate(k, table[1:])).sum(dim=-1)

    assert_close(product(3, 1), product(9, 7), ulps=64)
    assert not torch.allclose(product(3, 1), product(3, 2))
    turned = rotate(q, rope_table(torch.tensor([6]), height=1, width=1, head_width=12))
    assert_close(turned.norm(dim=-1), q.norm(dim=-1), ulps=16)
