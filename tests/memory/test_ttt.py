import pytest
import torch

from remanence.memory import ttt
from remanence.memory.ttt import TTTMLP, TTTLinear
from remanence.state import flatten


def outcome(kind, answers, long, monkeypatch, order):
    monkeypatch.setattr(ttt, "LONG", long)
    torch.manual_seed(0)
    memory = kind(16, **({"heads": 4, "chunk_size": 4} | answers)).double()
    with torch.no_grad():
        memory.norm.weight.add_(torch.randn(16) / 4)
        memory.norm.bias.add_(torch.randn(16) / 4)
    x = torch.randn(2, 11, 16, dtype=torch.float64, requires_grad=True)
    first, state = memory(x[:, :5])
    second, state = memory(x[:, 5:], state)
    y = torch.cat([first, second], 1)
    total = (y * torch.linspace(-1, 1, 16, dtype=torch.float64)).sin().sum()
    total = total + sum(t.square().sum() for t in flatten(state["net"]).values() if t.is_floating_point())
    wanted = [x, *memory.parameters()]
    found = torch.autograd.grad(total, wanted, create_graph=order > 1)
    if order > 1:
        found = torch.autograd.grad(sum(g.square().sum() for g in found), wanted)
    return [y, *flatten(state).values(), *found]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("kind", "answers"),
    [(TTTLinear, {}), (TTTLinear, {"gate": True}), (TTTMLP, {"conv": 2}), (TTTLinear, {"heads": 1})],
)
def test_sparing_memory_changes_nothing(kind, answers, order, monkeypatch):
    spared, plain = (outcome(kind, answers, long, monkeypatch, order) for long in (1, 2**62))
    for got, want in zip(spared, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_sparing_memory_leaves_hooked_modules_to_their_call(monkeypatch):
    monkeypatch.setattr(ttt, "LONG", 1)
    memory, called = TTTLinear(16, heads=4), []
    for module in (memory.qkv, memory.norm, memory.out):
        module.register_forward_hook(lambda module, *_: called.append(module))
    memory(torch.randn(1, 5, 16))
    assert called == [memory.qkv, memory.norm, memory.out]
