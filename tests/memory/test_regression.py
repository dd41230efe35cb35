import pytest
import torch

from remanence.errors import UnknownName
from remanence.memory.mesa import Mesa
from remanence.memory.test_time_regression import Regression
from remanence.memory.ttt import TTTMLP, TTTLinear
from remanence.ops.ttt import turned
from remanence.state import flatten

MEMBERS = [("all", "linear"), ("window", "linear"), ("window", "affine")]
MEMBERS += [("kernel", order) for order in ("constant", "linear", "affine")]


def draw(T, batch=2, seed=1):
    return torch.randn(batch, T, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def build(kind, **arguments):
    torch.manual_seed(0)
    return kind(8, heads=2, **arguments).double()


MEMORIES = [(Regression, {"weights": w, "order": o, "window": 4}) for w, o in MEMBERS]
MEMORIES += [(Mesa, {"steps": None, "gate": True}), (Mesa, {"head_dim": 6, "steps": 2})]
MEMORIES += [(TTTLinear, {"conv": 4, "gate": True, "chunk_size": 3}), (TTTMLP, {"layers": 3, "chunk_size": 1})]


@pytest.mark.parametrize(("kind", "arguments"), MEMORIES)
def test_every_member_resumes_and_every_parameter_is_learned(kind, arguments):
    memory, x = build(kind, **arguments), draw(11)
    want, want_state = memory(x)
    state, pieces = None, []
    for piece in x.tensor_split([1, 2, 6], 1):
        y, state = memory(piece, state)
        pieces.append(y)
    close(torch.cat(pieces, 1), want)
    close(flatten(state), flatten(want_state))
    grads = torch.autograd.grad(want.sin().sum(), memory.parameters(), allow_unused=True)
    for (name, _), grad in zip(memory.named_parameters(), grads, strict=True):
        assert grad is not None, name
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize(("kind", "arguments"), MEMORIES)
def test_a_monotonous_loud_stream_stays_finite(kind, arguments):
    memory = build(kind, **arguments).float()
    with torch.no_grad():
        y, state = memory(10 * draw(1).float().expand(2, 600, 8))
    assert y.isfinite().all()
    assert all(t.isfinite().all() for t in flatten(state).values())


def test_what_a_regression_refuses():
    with pytest.raises(UnknownName, match="did you mean 'kernel'"):
        Regression(8, weights="kernels")
    with pytest.raises(UnknownName, match="order of a regression"):
        Regression(8, order="cubic")
    with pytest.raises(ValueError, match="weights='all' need order='linear', got 'affine'"):
        Regression(8, weights="all")
    with pytest.raises(ValueError, match="a mean that ignores its keys"):
        Regression(8, weights="window", order="constant")
    with pytest.raises(ValueError, match="ridge > 0, got window=64, bandwidth="):
        Regression(8, ridge=0)
    with pytest.raises(ValueError, match="Mesa: ridge must be > 0"):
        Mesa(8, ridge=0)
    with pytest.raises(ValueError, match="conv at least 0, got layers=1, expand=4, chunk_size=0"):
        TTTLinear(8, chunk_size=0)


def test_the_first_ridge_is_one():
    memory = Mesa(8, heads=2)
    close(memory.least + torch.nn.functional.softplus(memory.ridge), torch.ones(2, 4), 1e-6)


def test_positions_turn_within_a_chunk_only():
    """Two chunks apart, the same tokens are the same keys."""
    turn = build(TTTLinear, chunk_size=4).turn(torch.device("cpu"))
    x = draw(2)[:, None]
    q = torch.cat([x, x], -1)[..., : 2 * turn.shape[2]]
    near, far, other = (turned(q, turn, place) for place in (1, 9, 0))
    close(near, far)
    close(near.norm(dim=-1), q.norm(dim=-1))
    assert (other - near).abs().max() > 1e-2
