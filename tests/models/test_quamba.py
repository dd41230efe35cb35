"""Eight bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence import ops
from remanence.errors import StateError
from remanence.memory import make
from remanence.memory.base import Memory
from remanence.models.language import LanguageModel
from remanence.models.quamba import Quantised, QuantLinear, hadamard, pack_state, quantise, rounded, unpack_state
from remanence.state import concat, flatten, load, nbytes, save, select


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 12, 20, 48, 64, 96, 160, 768])
def test_the_rotation_is_orthonormal_and_spreads(n: int) -> None:
    H = hadamard(n)
    torch.testing.assert_close(H @ H.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    flat = n in (1, 2, 12, 20, 48, 64, 96, 160, 768)
    assert H.abs().max() * n**0.5 < (1 + 1e-9 if flat else 1.5)


def test_the_rotation_spreads_outliers_before_they_are_rounded() -> None:
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 64, bias=False)
    linear.weight.data = torch.randn(64, 256, generator=g) / 16
    x = torch.randn(512, 256, generator=g)
    x[:, [3, 77]] *= 60
    want = linear(x)
    errors = []
    for rotate in (False, True):
        largest = (x @ hadamard(256).float() if rotate else x).abs().max()
        quantised = QuantLinear(linear, largest, rotate=rotate)
        # of what does not come from the outliers, whose share is large and easy
        errors.append(((quantised(x) - want).norm() / want.norm()).item())
        assert quantised.int8.dtype == torch.int8
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 1.5


def test_rounding_is_to_255_values_and_clips() -> None:
    x = torch.tensor([-2.0, -0.26, 0.0, 0.24, 0.9])
    assert rounded(x, torch.tensor(0.5 / 127)).tolist() == pytest.approx(
        [-0.5, -66 * 0.5 / 127, 0, 61 * 0.5 / 127, 0.5]
    )


class Bare(Memory):
    """A sum of the input's first half, so that what enters the recurrence is seen in what leaves it."""

    def __init__(self):
        super().__init__()
        self.dim = 2
        self.scale = nn.Parameter(torch.ones(2))

    def initial_state(self, batch):
        return {"h": torch.zeros(batch, 2)}

    def forward(self, x, state=None):
        return ops.scan(torch.full_like(x, -60.0), x * self.scale, self.begin(x, state))


def test_few_outliers_are_cut_where_they_enter_the_recurrence() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = Bare()

        def forward(self, x):
            return self.memory(x)[0]

    x = torch.rand(1, 5000, 2)
    x[0, 0, 0] = 1000
    naive, guarded = Model(), Model()
    quantise(naive, [x], percentile=100)
    quantise(guarded, [x], percentile=99.9)
    assert isinstance(guarded.memory, Quantised)
    error = [(m(x) - x)[0, 1:].abs().max() for m in (naive, guarded)]
    assert error[0] > 0.5
    assert error[1] < 0.005


@pytest.mark.parametrize("name", ["gla", "gated-deltanet", "hgrn", "griffin", "mamba2", "sliding-window", "titans"])
def test_any_model_is_quantised_and_stays_near_what_it_was(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(f"2*{name}", vocabulary=16, dim=16, ngrams=())
    model.head.weight.data.normal_(std=0.3)
    samples = [torch.randint(16, (2, 40)) for _ in range(3)]
    tokens = torch.randint(16, (2, 40))
    want, _ = model(tokens)
    weights = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("weight") and "mixer" in n)
    quantise(model, samples)
    left = sum(b.nbytes for n, b in model.named_buffers() if n.endswith("int8") and "mixer" in n)
    assert left < 0.3 * weights
    with torch.no_grad():
        got, state = model(tokens)
        error = (got - want).norm() / want.norm()
        assert 0 < error < 0.08
        first, half = model(tokens[:, :17])
        second, _end = model(tokens[:, 17:], half)  # an 8-bit model resumes as any other
        torch.testing.assert_close(torch.cat([first, second], 1), got, rtol=0, atol=0.05)
        for path, t in flatten(state).items():
            assert not t.is_floating_point() or t.element_size() >= 4, path


@pytest.mark.parametrize("name", ["gla", "gated-deltanet", "griffin", "retnet", "sliding-window"])
def test_a_state_at_rest_in_a_third_of_the_bytes(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    memory = make(name, 64)
    state = memory(torch.randn(3, 40, 64))[1]
    packed = pack_state(state)
    assert nbytes(packed) < nbytes(state) / 2.9
    save(packed, tmp_path / "packed")
    back = unpack_state(load(tmp_path / "packed"), memory.initial_state(3))
    for path, t in flatten(state).items():
        t = t.detach()
        assert flatten(back)[path].dtype == t.dtype
        if t.is_floating_point() and t.ndim > 1:
            assert ((flatten(back)[path] - t).abs() <= t.abs().amax(-1, keepdim=True) / 253).all(), path
        else:
            assert torch.equal(flatten(back)[path], t)
    memory(torch.randn(3, 2, 64), back)
    row = unpack_state(select(concat([packed, packed]), [4]), memory.initial_state(1))
    for path, t in flatten(row).items():
        assert torch.equal(t, flatten(back)[path][1:2])
    with pytest.raises(StateError, match="belongs to another layer"):
        unpack_state({"foreign": torch.zeros(1)}, memory.initial_state(3))


def test_samples_and_a_possible_percentile_are_needed() -> None:
    model = LanguageModel("gla", vocabulary=4, dim=8, ngrams=())
    with pytest.raises(ValueError, match="at least one sample"):
        quantise(model, [])
    with pytest.raises(ValueError, match=r"percentile must be in \(0, 100\], got 0"):
        quantise(model, [torch.zeros(1, 3, dtype=torch.long)], percentile=0)
