"""Token filtering."""

from __future__ import annotations

import pytest
import torch

from remanence import ops
from remanence.memory import make
from remanence.memory.base import Memory
from remanence.models.language import LanguageModel
from remanence.models.longmamba import LongMamba, extend, steps_of, threshold
from remanence.state import tree_map


class TwoHeads(Memory):
    """Linear attention whose first head forgets slowly by the input, the second at once; keys and values are 1."""

    def __init__(self):
        super().__init__()
        self.dim = 1
        self.rate = torch.nn.Parameter(torch.tensor([0.002, 5.0], dtype=torch.float64))

    def initial_state(self, batch):
        return {"S": self.rate.new_zeros(batch, 2, 1, 1)}

    def forward(self, x, state=None):
        state = self.begin(x, state)
        one = torch.ones(x.shape[0], 2, x.shape[1], 1, dtype=torch.float64)
        decay = -(x * self.rate).mT
        y, after = ops.linear_attention(one, one, one, decay, state)
        return y[:, :1, :, 0].mT, after


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = TwoHeads()

    def forward(self, x):
        return self.memory(x)[0]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_kept_steps_sum_to_the_budget() -> None:
    steps = draw(3, 200).exp()
    for length in (200, 1000, 5000):
        theta = threshold(steps, length)
        long = torch.nn.functional.interpolate(
            steps.sort(1, descending=True).values[:, None], size=length, mode="linear", align_corners=True
        )[:, 0]
        kept = torch.where(long > theta[:, None], long, 0)
        budget = steps.sum(1)
        assert (kept.sum(1) <= budget * (1 + 1e-3)).all()
        assert (kept.sum(1) > 0.98 * budget - long[:, 0]).all()
    assert (threshold(steps, 200) <= steps.amin(1) + 1e-12).all()  # at the trained length all may stay


def test_only_lasting_heads_skip_and_only_far_beyond_the_trained_length() -> None:
    model, plain = Model(), TwoHeads()
    with torch.no_grad():
        (wrapped,) = extend(model, [draw(4, 100, 1)], lengths=(200, 400, 800))
        assert isinstance(model.memory, LongMamba)
        assert wrapped.trained == 100
        assert (wrapped.threshold0[:, 0] > 0).all()
        assert (wrapped.threshold0[:, 1] == -1).all()
        assert (wrapped.threshold0[:, 0].diff() >= 0).all()
        long = draw(1, 800, 1, seed=1)
        wrapped.total = 800
        (y, end), (want, want_end) = wrapped(long), plain(long)
        assert torch.equal(end["memory"]["S"][:, 1], want_end["S"][:, 1])  # the local head, to the bit
        # the slow head now keeps what a text of 100 tokens would leave of its first
        skipped = long <= wrapped.threshold0[2, 0] / 0.002
        assert (long.masked_fill(skipped, 0).sum() - draw(1, 100, 1, seed=2).sum()).abs() < 25 < long.sum() - 700
        assert not torch.allclose(y, want)
        wrapped.total = 200
        assert torch.equal(wrapped(long[:, :200])[0], plain(long[:, :200])[0])


@pytest.mark.parametrize("total", [None, 300])
def test_a_stream_resumes_wherever_it_is_cut(total: int | None) -> None:
    model = Model()
    (wrapped,) = extend(model, [draw(2, 10, 1)], lengths=(20, 40, 80))
    wrapped.total = total
    x = draw(2, 100, 1, seed=1)
    whole, end = wrapped(x)
    state, pieces = None, []
    for piece in x.tensor_split([0, 1, 19, 20, 21, 55], dim=1):
        y, state = wrapped(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-9) or a, state, end)
    assert end["seen"].tolist() == [100, 100]


@pytest.mark.parametrize(
    ("name", "given"),
    [("gla", {"rank": 3}), ("gated-deltanet", {}), ("hgrn", {}), ("griffin", {}), ("mamba2", {"state_size": 3})],
)
def test_any_gated_memory_can_be_extended(name: str, given: dict) -> None:
    torch.manual_seed(0)
    if name in ("gla", "gated-deltanet"):
        given = {"heads": 2, **given}
    memory = make(name, 8, **given)
    model = LanguageModel(f"2*{name}", vocabulary=11, dim=8, ngrams=(), arguments={name: given})
    model.head.weight.data.normal_()
    tokens = torch.randint(11, (2, 60))
    want = model(tokens)[0]
    wrapped = extend(model, [tokens[:, :12]], lengths=(30, 60), lasting=0, top=0.2)
    assert len(wrapped) == 2
    assert all(isinstance(m, LongMamba) for m in model.memories)
    torch.testing.assert_close(
        model(tokens[:, :24])[0], want[:, :24], rtol=0, atol=1e-5
    )  # up to twice the length nothing is skipped
    assert (model(tokens)[0] - want).abs().max() > 1e-3
    assert len(steps_of(memory, torch.randn(1, 5, 8))) >= 1


def test_memories_that_forget_by_no_input_are_left_alone() -> None:
    model = LanguageModel("linear-attention, retnet", vocabulary=5, dim=8, ngrams=())
    model.head.weight.data.normal_()
    tokens = torch.randint(5, (1, 50))
    want = model(tokens)[0]
    extend(model, [tokens[:, :10]], lengths=(20, 50), lasting=0)
    assert type(model.memories[0]).__name__ == "LinearAttention"
    assert torch.equal(model(tokens)[0], want)


def test_samples_are_needed_and_of_one_length() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        extend(Model(), [])
    with pytest.raises(ValueError, match="one length, got 5 and 6"):
        extend(Model(), [draw(1, 5, 1), draw(1, 6, 1)])
