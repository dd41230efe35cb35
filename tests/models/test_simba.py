"""Token pruning."""

from __future__ import annotations

import pytest
import torch

from remanence import ops
from remanence.memory import make
from remanence.memory.base import Memory
from remanence.models.language import LanguageModel
from remanence.models.simba import contributions, falling, prune_tokens, token_pruning

ARGUMENTS = {"gla": {"heads": 2, "rank": 3}, "gated-deltanet": {"heads": 2}, "titans": {"heads": 2}}


class Plain(Memory):
    """Linear attention whose queries, keys, values and decays are shares of the input."""

    dim = 7

    def initial_state(self, batch):
        return {"S": torch.zeros(batch, 1, 2, 2, dtype=torch.float64)}

    def forward(self, x, state=None):
        state = self.begin(x, state)
        q, k, v, g = (p[:, None] for p in x.split([2, 2, 2, 1], -1))
        y, after = ops.linear_attention(q, k, v, -g[..., 0].abs(), state)
        return torch.cat([y[:, 0], x[..., 2:]], -1), after


def test_scores_are_each_tokens_share_of_the_last_output() -> None:
    x = torch.randn(2, 12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = contributions(Plain(), x)
    q, k, v, g = x.split([2, 2, 2, 1], -1)
    kept = g[..., 0].abs().flip(1).cumsum(1).flip(1) - g[..., 0].abs()
    share = (q[:, -1:] * k).sum(-1) * (-kept).exp()
    torch.testing.assert_close(got, share.abs() * v.abs().sum(-1))


@pytest.mark.parametrize(
    "name", ["gla", "gated-deltanet", "hgrn", "griffin", "mamba2", "sliding-window", "titans", "retnet"]
)
def test_every_memory_has_scores_and_what_adds_nothing_has_none(name: str) -> None:
    torch.manual_seed(0)
    memory = make(name, 8, **{k: v for k, v in ARGUMENTS.items() if k == name}.get(name, {})).double()
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    scores = contributions(memory, x, memory.initial_state(2))
    assert scores.shape == (2, 10)
    assert (scores >= 0).all()
    assert (scores.sum(1) > 0).all()
    assert contributions(memory, x[:, :0]).shape == (2, 0)


def test_pruning_keeps_the_highest_in_order_and_always_the_last() -> None:
    scores = torch.tensor([[5.0, 1, 4, 3, 0], [0.0, 9, 1, 8, 2]])
    assert prune_tokens(scores, 3).tolist() == [[0, 2, 4], [1, 3, 4]]
    with pytest.raises(ValueError, match="keep must be from 1 to 5, got 6"):
        prune_tokens(scores, 6)


def model() -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel("2*gla, gated-deltanet, hgrn", vocabulary=11, dim=8, ngrams=(2,), arguments=ARGUMENTS)
    lm.head.weight.data.normal_()
    return lm.eval()


def test_all_kept_is_the_model_to_the_bit_and_some_kept_is_a_shorter_stack() -> None:
    lm, tokens = model(), torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, end = lm(tokens)
        with token_pruning(lm.blocks, [1.0] * 4) as kept:
            got, _ = lm(tokens)
        assert torch.equal(got, want)
        assert not kept
        with token_pruning(lm.blocks, [1.0, 0.5, 0.5, 0.25]) as kept:
            for _ in range(2):  # what a call notes does not outlive it
                got, state = lm(tokens)
        assert got.shape == (2, 5, 11)
        assert [places.shape for places in kept] == [(2, 10), (2, 5)]
        for first, second in zip(*[places.tolist() for places in kept], strict=True):
            assert set(second) <= set(first)
            assert second == sorted(second)
            assert second[-1] == 19
        torch.testing.assert_close(state["layers"]["0"], end["layers"]["0"])  # the first layers read everything
        again, _ = lm(tokens)
    assert torch.equal(again, want)  # no hook is left
    lm(torch.tensor([[1], [2]]), state)  # and decoding goes on from what was read


def test_shares_that_rise_or_are_too_few_are_refused() -> None:
    lm = model()
    for keep in ([1.0, 0.5, 0.6, 0.5], [1.0], [1.5, 1, 1, 1], [1.0, 1, 1, 0]):
        with pytest.raises(ValueError, match="4 shares in"), token_pruning(lm.blocks, keep):
            raise AssertionError("it was taken")
    assert falling(6, 0.1, 3) == [1.0, 1.0, 0.55, 0.55, 0.55, 0.1]
