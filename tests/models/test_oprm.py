"""Chunked reading of long inputs."""

from __future__ import annotations

import pytest
import torch

from remanence.errors import ShapeError, UnknownName
from remanence.models.language import LanguageModel
from remanence.models.oprm import _choose, decode, read_chunks
from remanence.state import flatten


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    given = {"gated-deltanet": {"heads": 2}, "retnet": {"heads": 2}}
    lm = LanguageModel("gated-deltanet, retnet", vocabulary=11, dim=8, arguments=given)
    lm.head.weight.data.normal_()
    return lm.double().eval()


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize(("chunk", "overlap", "starts"), [(10, 0, [0, 10, 20, 23]), (10, 4, [0, 6, 12, 18, 23])])
def test_every_row_is_the_model_over_prefix_chunk_and_query(model, with_prefix, chunk, overlap, starts) -> None:
    context, query, prefix = tokens(33), tokens(3, 1), tokens(5, 2)
    got = read_chunks(
        model, context, query, prefix=prefix if with_prefix else None, chunk=chunk, overlap=overlap, batch=2
    )
    assert got.starts.tolist() == starts
    for row, first in enumerate(starts):
        text = torch.cat([prefix[: 5 * with_prefix], context[first : first + chunk], query])
        want, end = model(text[None])
        torch.testing.assert_close(got.logits[row], want[0, -1])
        for path, t in flatten(got.state).items():
            torch.testing.assert_close(t[row : row + 1], flatten(end)[path])
    entropy = torch.distributions.Categorical(logits=got.logits).entropy()
    assert got.chosen == int(entropy.argmin())
    out = decode(model, *got.best, 4)
    text = torch.cat([text[: 5 * with_prefix], context[starts[got.chosen] :][:chunk], query])
    for step in range(4):
        best = model(text[None])[0][0, -1].argmax()
        assert out[0, step] == best
        text = torch.cat([text, best[None]])
    assert decode(model, got.logits, got.state, 3).shape == (len(starts), 3)  # all of them, for summaries
    assert decode(model, *got.best, 0).shape == (1, 0)


def test_a_context_shorter_than_a_chunk_is_one_chunk(model) -> None:
    got = read_chunks(model, tokens(4), tokens(1), chunk=10)
    assert got.starts.tolist() == [0]
    assert got.chosen == 0


def test_the_choice() -> None:
    p = torch.tensor([[0.5, 0.49, 0.01], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8], [0.55, 0.45, 0.0]])
    logits = p.log()
    assert _choose(logits, "min_entropy", []) == 2
    assert _choose(logits, "max_prob", []) == 2
    assert _choose(logits, "last", []) == 3
    assert _choose(logits, "min_entropy", [2]) == 3  # "not here" is passed over
    assert _choose(logits, "max_prob", [2]) == 1
    assert _choose(logits, "max_prob", [0, 2]) == 2  # unless all say so
    assert _choose(torch.zeros(3, 4), "min_entropy", []) == 0  # the first among equals


def test_impossible_arguments_are_refused_in_words(model) -> None:
    with pytest.raises(ShapeError, match=r"query must be \[time\], at least one token, got \[0\]"):
        read_chunks(model, tokens(4), tokens(0))
    with pytest.raises(ShapeError, match=r"context must be \[time\].*got \[1, 4\]"):
        read_chunks(model, tokens(4)[None], tokens(1))
    with pytest.raises(ValueError, match="chunk=4, overlap=4"):
        read_chunks(model, tokens(9), tokens(1), chunk=4, overlap=4)
    with pytest.raises(UnknownName, match="did you mean 'max_prob'"):
        read_chunks(model, tokens(9), tokens(1), choose="max-prob")
