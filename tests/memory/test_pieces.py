"""What reading in pieces is besides a law of every memory (tests/laws)."""

import pytest
import torch
from torch import nn

from remanence.memory import in_pieces, make
from remanence.models.language import LanguageModel


class Noisy(nn.Module):
    """A leaky sum with dropout, and a state with an empty part and a count."""

    def __init__(self):
        super().__init__()
        self.map, self.drop = nn.Linear(3, 3).double(), nn.Dropout(0.5)

    def forward(self, x, state=None):
        state = state or {"h": x.new_zeros(len(x), 3), "none": {}, "seen": torch.zeros(len(x), dtype=torch.int64)}
        h, y = state["h"], []
        for token in self.drop(self.map(x)).unbind(1):
            h = torch.tanh(0.5 * h + token)
            y.append(h)
        return torch.stack(y, 1), {"h": h, "none": state["none"], "seen": state["seen"] + x.shape[1]}


def test_dropout_is_the_same_in_both_readings():
    torch.manual_seed(0)
    module, x = Noisy(), torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)

    def loss(x):
        torch.manual_seed(1)
        y, state = in_pieces(module, x, piece=3)
        assert state["none"] == {}
        assert state["seen"].tolist() == [10, 10]
        return y.square().sum() + state["h"].sum()

    assert torch.autograd.gradcheck(loss, x)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    in_pieces(module, x, piece=3)[0].sum().backward()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    module(x)
    assert torch.equal(torch.get_rng_state(), after)  # backward draws nothing from what comes next


def test_second_derivatives():
    torch.manual_seed(0)
    module = Noisy().eval()
    x = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: in_pieces(module, module.map(x), piece=3)[0], x)

    def penalty(read):
        (slope,) = torch.autograd.grad(read(module.map(x))[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(module.parameters()))

    for got, want in zip(penalty(lambda x: in_pieces(module, x, piece=2)), penalty(module), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_whole_model_reads_tokens_in_pieces():
    torch.manual_seed(0)
    model = LanguageModel("griffin, gated-deltanet", vocabulary=20, dim=16).double()
    nn.init.normal_(model.head.weight)
    tokens = torch.randint(20, (2, 23))
    weights = list(model.parameters())
    for piece in (1, 5, 22, 23, 100):
        found = []
        for read in (model, lambda x, piece=piece: in_pieces(model, x, piece=piece)):
            logits, _ = read(tokens)
            found.append([logits, *torch.autograd.grad(logits.square().sum(), weights)])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_what_is_kept_does_not_grow_with_time():
    memory = make("min-lstm", 64)

    def kept(read, time):
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(1, time, 64)
        weights = {p.data_ptr() for p in memory.parameters()} | {x.data_ptr()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            read(x)
        return sum(n for at, n in sizes.items() if at not in weights)

    at_once = kept(memory, 1024), kept(memory, 2048)
    pieces = [kept(lambda x: in_pieces(memory, x, piece=64), time) for time in (1024, 2048)]
    assert at_once[1] > 1.9 * at_once[0]
    assert pieces[1] <= pieces[0] < at_once[0] / 8


def test_frozen_modules_and_no_gradients():
    memory, x = make("min-lstm", 8), torch.randn(1, 9, 8)
    want = memory(x)[0].detach()
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(memory, x, piece=4)[0], want)
    memory.requires_grad_(False)
    y, _ = in_pieces(memory, x, piece=4)
    assert not y.requires_grad
    torch.testing.assert_close(y, want)
    y, _ = in_pieces(memory, x.requires_grad_(), piece=4)
    y.sum().backward()
    assert x.grad is not None


def test_an_impossible_piece_or_choice_is_refused():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        in_pieces(make("min-lstm", 8), torch.randn(1, 9, 8), piece=0)
    with pytest.raises(ValueError, match="'states' or 'projections', got 'all'"):
        in_pieces(make("min-lstm", 8), torch.randn(1, 9, 8), keep="all")


def test_states_do_not_keep_what_they_were_taken_from():
    memory, x = make("min-lstm", 8), torch.randn(1, 40, 8)
    y, after = in_pieces(memory, x, piece=10)
    states = [after, *(state for state, _, _ in y.grad_fn.before[1:])]
    assert [state["h"].untyped_storage().nbytes() for state in states] == [state["h"].nbytes for state in states]


class Apart(nn.Module):
    """Two parameters whose gradients are one tensor, as that of a sum is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(3).double()) for _ in "ab")

    def forward(self, x, state=None):
        return x * (self.a + self.b), {"last": x[:, -1]}


def test_gradients_that_are_one_tensor_are_added_up_apart():
    module, x = Apart(), torch.randn(1, 12, 3).double()
    for keep in ("states", "projections"):
        of_a, of_b = torch.autograd.grad(in_pieces(module, x, piece=3, keep=keep)[0].sum(), list(module.parameters()))
        torch.testing.assert_close(of_a, x.sum((0, 1)))
        torch.testing.assert_close(of_b, x.sum((0, 1)))


def test_weights_that_are_lent_to_a_module():
    memory, x = make("min-lstm", 8).double(), torch.randn(1, 9, 8).double()
    lent = {name: (2 * p.detach()).requires_grad_() for name, p in memory.named_parameters()}

    class Outer(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.memory, self.keep = memory, keep

        def forward(self, x):
            return in_pieces(self.memory, x, piece=4, keep=self.keep)[0] if self.keep else self.memory(x)[0]

    found = []
    for keep in (None, "states", "projections"):
        y = torch.func.functional_call(Outer(keep), {f"memory.{name}": 1 * p for name, p in lent.items()}, (x,))
        found.append(torch.autograd.grad(y.square().sum(), list(lent.values())))
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-9, atol=1e-9)
