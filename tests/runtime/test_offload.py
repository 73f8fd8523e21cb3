"""Networks that leave their device; the meta device plays one that is not the host."""

import pytest
import torch
from torch import nn

from flowcache.runtime import memory
from flowcache.runtime.memory import HostWeights, aside

ELSEWHERE = torch.device("meta")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 3).to(torch.bfloat16)))


def test_a_network_off_its_device_has_the_weights_it_had(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "BLOCK_BYTES", 100)  # some weights share a block, one has its own
    made = network()
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    weights = HostWeights(made, ELSEWHERE)
    weights.come()
    assert {p.device for p in made.parameters()} == {ELSEWHERE}
    weights.leave()
    after = dict(made.named_parameters())
    assert list(after) == list(before)
    for name, parameter in after.items():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])


def test_leaving_copies_nothing():
    made = network()
    weights = HostWeights(made, ELSEWHERE)
    weights.leave()
    places = [p.data_ptr() for p in made.parameters()]
    weights.come()
    weights.leave()
    assert [p.data_ptr() for p in made.parameters()] == places


def test_on_the_host_itself_nothing_is_copied():
    made = network()
    places = [p.data_ptr() for p in made.parameters()]
    weights = HostWeights(made, torch.device("cpu"))
    weights.leave()
    weights.come()
    assert [p.data_ptr() for p in made.parameters()] == places


def test_a_network_is_back_after_an_error():
    made = network()
    weights = HostWeights(made, ELSEWHERE)
    weights.come()
    with pytest.raises(ZeroDivisionError), aside(weights):
        assert made[0].weight.device.type == "cpu"
        _ = 1 / 0
    assert made[0].weight.device == ELSEWHERE
