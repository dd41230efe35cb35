"""How far back the past matters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from remanence.errors import ShapeError
from remanence.evaluation.diagnostics.effective_remembrance import effective_remembrance, loss_by_position, state_norms
from remanence.memory import make


class Leaky(nn.Module):
    """h = γh + x over two tokens, whose next-token distribution is linear in h."""

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma = gamma

    def forward(self, tokens):
        h = torch.zeros(tokens.shape[0], dtype=torch.float64)
        for t in range(tokens.shape[1]):
            h = self.gamma * h + (2.0 * tokens[:, t] - 1) * (1 - self.gamma)
        p = 0.5 + 0.4 * h
        return torch.stack([1 - p, p], -1).log()[:, None]


def test_a_leaky_sum_forgets_at_its_own_rate() -> None:
    tokens = torch.ones(1, 60, dtype=torch.long)
    starts = [60 - 1, 50, 40, 30, 1, 0]
    got = effective_remembrance(Leaky(0.9), tokens, starts)[:, 0]
    # of tokens that are all alike, those before t add γ^(T − t) (1 − γ^t)
    want = torch.tensor([0.4 * 0.9 ** (60 - t) * (1 - 0.9**t) for t in starts], dtype=torch.float64)
    torch.testing.assert_close(got, want)
    assert got[-1] == 0
    assert (got >= 0).all()
    assert (got <= 1).all()


def test_loss_by_position_is_the_mean_over_each_stretch() -> None:
    tokens = torch.randint(5, (3, 21), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(3, 21, 5, generator=torch.Generator().manual_seed(1))
    first, losses = loss_by_position(lambda x: (logits, None), tokens, bins=3)
    each = -logits.double().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].mean(0)
    assert first.tolist() == [0, 7, 14]
    torch.testing.assert_close(losses, torch.stack([each[:7].mean(), each[7:14].mean(), each[14:].mean()]))


def test_state_norms_are_those_of_the_states_on_the_way() -> None:
    torch.manual_seed(0)
    memory, x = make("retnet", 8, heads=2), torch.randn(2, 30, 8)
    norms = state_norms(memory, x, [0, 4, 4, 30])
    assert set(norms) == {"S"}
    assert norms["S"][0].tolist() == [0, 0]
    for row, n in enumerate([0, 4, 4, 30]):
        torch.testing.assert_close(norms["S"][row], memory(x[:, :n])[1]["S"].detach().flatten(1).double().norm(dim=1))


def test_what_is_out_of_range_is_refused_in_words() -> None:
    tokens = torch.zeros(1, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="starts must be from 0 to 5, got 6"):
        effective_remembrance(Leaky(0.5), tokens, [0, 6])
    with pytest.raises(ShapeError, match=r"tokens must be \[batch, time\], got \[6\]"):
        effective_remembrance(Leaky(0.5), tokens[0], [0])
    with pytest.raises(ValueError, match="bins must be from 1 to 5, got 6"):
        loss_by_position(Leaky(0.5), tokens, bins=6)
    with pytest.raises(ValueError, match="positions must rise from 0 to 6"):
        state_norms(make("hgrn", 4), torch.zeros(1, 6, 4), [3, 2])
