"""Products of projections: computed once where they are kept, and with the same gradients."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from remanence import ops
from remanence.memory import in_pieces, make
from remanence.memory.linear import Linear


class Leaky(nn.Module):
    """A leaky sum between projections. `way` says how they are called."""

    def __init__(self, way="plain"):
        super().__init__()
        self.way, self.calls = way, 0
        self.into, self.out = Linear(4, 4).double(), Linear(4, 4, bias=False).double()

    def forward(self, x, state=None):
        self.calls += 1
        z = self.into(x)
        if self.way == "in place":
            z = z.mul_(0.5)
        elif self.way == "twice":
            z = z * self.into(2 * z)
        elif self.way == "another each time":
            z = z + (0 if self.calls % 2 else 1) * self.into(x) * 0
        elif self.way == "inner":
            z, _ = in_pieces(Row(self.into), x, piece=2, keep="projections")
        elif self.way == "checkpoint":
            z = checkpoint(lambda x: self.into(x).tanh(), x, use_reentrant=False)
        elif self.way == "thread":
            found = []
            worker = threading.Thread(target=lambda: found.append(self.into(x.detach()).detach()))
            worker.start()
            worker.join()
            z = z * found[0]
        elif self.way == "vmap":
            z = torch.vmap(self.into)(x)
        h, rows = x.new_zeros(len(x), 4) if state is None else state["h"], []
        for token in z.unbind(1):
            h = torch.tanh(0.5 * h + token)
            rows.append(h)
        y = self.out(torch.stack(rows, 1))
        return y, {"h": (y[:, -1] * h).tanh() if self.way == "state of the output" else h}


class Row(nn.Module):
    def __init__(self, map_):
        super().__init__()
        self.map = map_

    def forward(self, x, state=None):
        return self.map(x), state or {"none": {}}


WAYS = "plain", "in place", "twice", "another each time", "inner", "checkpoint", "thread", "vmap", "state of the output"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_are_those_of_reading_at_once(way, batch):
    torch.manual_seed(0)
    module = Leaky(way)
    x = torch.randn(batch, 11, 4, dtype=torch.float64, requires_grad=True)

    def slopes(piece):
        state, y = None, []
        if piece is None:  # by hand, since a state of the output depends on where it is cut
            for part in x.split(3, 1):
                out, state = module(part, state)
                y.append(out)
            y = torch.cat(y, 1)
        else:
            y, state = in_pieces(module, x, piece=piece, keep="projections")
            y = y.mul_(1.0) if way == "state of the output" else y
        loss = y.square().sum() + state["h"].sum()
        return torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True), loss

    want, _ = slopes(None)
    got, loss = slopes(3)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    again = torch.autograd.grad(loss, [x, *module.parameters()])  # the kept products were used up
    torch.testing.assert_close(again, want, rtol=1e-9, atol=1e-9)


def test_a_kept_product_is_not_computed_again(monkeypatch):
    count, linear = [0], ops.linear

    def counted(*given):
        count[0] += 1
        return linear(*given)

    monkeypatch.setattr(ops, "linear", counted)
    memory, x = make("gated-deltanet", 8, heads=2), torch.randn(1, 12, 8)
    memory(x)
    once = count[0]
    for keep, times in (("projections", 3), ("states", 5)):  # of three pieces, the last is always read once
        count[0] = 0
        in_pieces(memory, x, piece=4, keep=keep)[0].sum().backward()
        assert count[0] == times * once


def test_what_is_kept_is_the_outputs_of_projections_and_no_output_twice():
    module, x = Leaky(), torch.randn(2, 40, 4, dtype=torch.float64)
    y, _ = in_pieces(module, x, piece=10, keep="projections")
    kept = [entry[0] for _, _, products in y.grad_fn.before for entry in products.kept or []]
    own = [t for t in kept if t.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()]
    assert len(kept) == 2 * len(own) == 6
    assert sum(t.untyped_storage().nbytes() for t in own) == x.nbytes * 3 // 4
    y.sum().backward(retain_graph=True)
    assert all(entry is None for _, _, products in y.grad_fn.before for entry in products.kept or [])


def test_one_precision_or_none():
    memory, x = make("gated-deltanet", 16, heads=2), torch.randn(1, 12, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = in_pieces(memory, x, piece=4, keep="projections")
    kept = [entry for _, _, products in y.grad_fn.before for entry in products.kept or []]
    assert kept
    assert all(entry is None for entry in kept)


def test_products_of_few_inputs_are_not_kept(monkeypatch):
    monkeypatch.setattr("remanence.memory.linear.FEW", 4)
    x = torch.randn(1, 12, 4, dtype=torch.float64)
    y, _ = in_pieces(Leaky(), x, piece=4, keep="projections")
    assert not any(entry for _, _, products in y.grad_fn.before for entry in products.kept or [])
