import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops.chunk_attention import chunk_attention, chunk_attention_reference


@settings(deadline=None, max_examples=30)
@given(
    T=st.sampled_from([0, 1, 2, 5, 6, 13, 40]),
    C=st.sampled_from([1, 2, 6]),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    phase=st.sampled_from([None, 0, 1, 5]),
)
def test_any_cuts_and_phases_give_the_loop(obeys, draw, T, C, cuts, phase):
    noise = draw(T)
    bias = noise(C)
    state = None
    if phase is not None:  # rows at different places of their chunks
        _, state = chunk_attention_reference(*(noise(2, phase, 3) for _ in range(3)), bias)
        state = {n: t.detach() for n, t in state.items()}
        state["position"] = torch.tensor([phase, phase + C * 7])
        state["k"].requires_grad_(), state["v"].requires_grad_()
    obeys(
        lambda q, k, v, state: chunk_attention(q, k, v, bias, state),
        lambda q, k, v, state: chunk_attention_reference(q, k, v, bias, state),
        [noise(2, T, 3), noise(2, T, 3), noise(2, T, 4 if phase is None else 3)],
        sorted(min(c, T) for c in cuts),
        state,
        others=[bias],
        axis=1,
    )


def test_rows_of_different_phase_run_together(draw):
    noise, bias = draw(0), draw(1)(6)
    q, k, v = (noise(2, 20, 3) for _ in range(3))
    _, first = chunk_attention(q[:1, :4], k[:1, :4], v[:1, :4], bias)
    _, second = chunk_attention(q[1:, :1], k[1:, :1], v[1:, :1], bias)
    both = {n: torch.cat([first[n], second[n]]) for n in first}
    for T in (3, 14):
        y, end = chunk_attention(q[:, 4 : 4 + T], k[:, 4 : 4 + T], v[:, 4 : 4 + T], bias, both)
        for i, state in enumerate((first, second)):
            row = slice(i, i + 1)
            alone, after = chunk_attention(q[row, 4 : 4 + T], k[row, 4 : 4 + T], v[row, 4 : 4 + T], bias, state)
            torch.testing.assert_close(y[row], alone)
            torch.testing.assert_close(end["k"][row], after["k"])


def test_it_is_attention_chunk_by_chunk(draw):
    q, k, v = (draw(i)(2, 24, 4) for i in range(3))
    parts = (x.unflatten(1, (4, 6)) for x in (q, k, v))
    want = F.scaled_dot_product_attention(*parts, is_causal=True).flatten(1, 2)
    torch.testing.assert_close(chunk_attention(q, k, v, torch.zeros(6, dtype=torch.float64))[0], want)


def test_a_wrong_length_is_refused(draw):
    with pytest.raises(ShapeError, match="time=5"):
        chunk_attention(draw(0)(2, 4, 3), draw(0)(2, 5, 3), draw(0)(2, 5, 3), draw(0)(6))
