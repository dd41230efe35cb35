import pytest
import torch

from remanence import ops
from remanence.errors import ShapeError
from remanence.ops.ttt import ttt, ttt_reference, ttt_state, ttt_weights
from remanence.state import concat, flatten, select

B, H, K, C = 2, 2, 4, 5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(T, layers):
    q, k, v = (draw(B, H, T, K, seed=i) for i in range(3))
    step = 0.5 * draw(B, H, T, seed=3).sigmoid()
    average = 1 / torch.arange(1, C + 1, dtype=torch.float64) + 0.1 * draw(C, seed=4)
    widths = [K] + [6] * (layers - 1) + [K]
    weights = [0.3 * draw(H, widths[i + 1], widths[i] + 1, seed=10 + i) for i in range(layers)]
    leaves = [q, k, v, step, average, 1 + 0.2 * draw(H, K, seed=5), 0.2 * draw(H, K, seed=6), *weights]
    return [x.requires_grad_() for x in leaves]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def grads(y, state, leaves):
    ends = (y, *(t for t in flatten(state).values() if t.is_floating_point()))
    loss = sum((t * draw(*t.shape, seed=20 + i)).sum() for i, t in enumerate(ends))
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("T", "cuts"), [(0, []), (1, []), (13, []), (15, [5]), (13, [0, 1, 1, 7]), (12, range(1, 12))])
def test_ttt_is_its_reference_at_any_cut(layers, T, cuts):
    leaves = inputs(T, layers)
    sequence, fixed, weights = leaves[:4], leaves[4:7], leaves[7:]
    start = ttt_state(weights, B)
    want, want_state = ttt_reference(*sequence, *fixed, start)
    pieces, state = [], start
    for piece in zip(*(x.tensor_split(list(cuts), 2) for x in sequence), strict=True):
        y, state = ttt(*piece, *fixed, state)
        pieces.append(y)
    got = torch.cat(pieces, 2)
    close(got, want)
    close(flatten(state), flatten(want_state))
    if T:
        close(grads(got, state, leaves), grads(want, want_state, leaves))


@pytest.mark.parametrize("begun", [0, 3])
def test_what_is_made_again_for_the_gradient_is_the_same(begun):
    leaves = inputs(23, 2)
    sequence, fixed, start = leaves[:4], leaves[4:7], ttt_state(leaves[7:], B)
    start = ttt(*(x[:, :, :begun] for x in sequence), *fixed, start)[1]
    rest = [x[:, :, begun:] for x in sequence]
    want, got = ttt(*rest, *fixed, start), ttt(*rest, *fixed, start, checkpoint=2)
    close(got[0], want[0])
    close(flatten(got[1]), flatten(want[1]))
    close(grads(*got, leaves), grads(*want, leaves))


def test_rows_may_stand_at_different_positions():
    leaves = inputs(13, 2)
    sequence, fixed, start = leaves[:4], leaves[4:7], ttt_state(leaves[7:], B)
    whole, _ = ttt(*sequence, *fixed, start)
    early = ttt(*(x[:, :, :3] for x in sequence), *fixed, start)[1]
    late = ttt(*(x[:, :, :6] for x in sequence), *fixed, start)[1]
    mixed = concat([select(early, 0), select(late, 1)])
    y, _ = ttt(*(torch.stack([x[0, :, 3:9], x[1, :, 6:12]]) for x in sequence), *fixed, mixed)
    close(y, torch.stack([whole[0, :, 3:9], whole[1, :, 6:12]]))


def test_its_weights_are_those_of_the_last_read():
    *sequence, average, scale, shift, W = inputs(7, 1)
    y, state = ttt(*sequence, average, scale, shift, ttt_state([W], B))
    (last,) = ttt_weights(state, average)
    z = torch.einsum("bhoi,bhi->bho", last, torch.nn.functional.pad(sequence[0][:, :, -1], (0, 1), value=1.0))
    norm = torch.nn.functional.layer_norm(z, (K,), eps=1e-6) * scale + shift
    close(y[:, :, -1], sequence[0][:, :, -1] + norm)


def test_a_mean_is_not_a_sum():
    """The factor c is taken anew at each token: one that were taken as each token is written gives another memory."""
    *sequence, average, scale, shift, W = inputs(5, 1)
    y, _ = ttt(*sequence, average, scale, shift, ttt_state([W], B))
    running = [*sequence[:3], sequence[3] * average]
    other, _ = ttt(*running, torch.ones_like(average), scale, shift, ttt_state([W], B))
    close(other[:, :, 0], y[:, :, 0])
    assert (other[:, :, 1:] - y[:, :, 1:]).abs().max() > 1e-3


def test_without_norm_and_skip_the_whole_sequence_as_one_chunk_is_linear_attention():
    q, k, v = (draw(B, H, 9, K, seed=i) for i in range(3))
    start = ops.fast_weight_state([torch.zeros(H, K, K, dtype=torch.float64)], B, momentum=False)
    y, _ = ops.fast_weight(q, k, v, torch.ones(B, H, 9, dtype=torch.float64), start, chunk_size=9)
    close(y, ops.linear_attention(q, k, v)[0])


def test_what_it_refuses():
    *sequence, average, scale, shift, W = inputs(3, 1)
    with pytest.raises(ShapeError, match="step must be"):
        ttt(*sequence[:3], sequence[3][:, :1], average, scale, shift, ttt_state([W], B))
    with pytest.raises(ShapeError, match="must give 4 features, as the keys have, got 3"):
        ttt(*sequence, average, scale, shift, ttt_state([W[:, :3]], B))
