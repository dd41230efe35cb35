import pytest
import torch

from remanence.memory.parts import rotate
from remanence.ops.rotary import turned_heads

B, T, K = 2, 9, 6
FREQUENCIES = 10000.0 ** -(torch.arange(0, K, 2, dtype=torch.float64) / K)


def apart(x, heads):
    return x.unflatten(-1, (sum(heads), -1)).transpose(1, 2).split(list(heads), 1)


@pytest.mark.parametrize("start", [(0, 0), (3, 10**7)])
@pytest.mark.parametrize("pairs", [3, 1, 0])
def test_heads_are_turned_and_laid_apart_and_so_are_gradients(draw, start, pairs):
    x, heads, start = draw(0)(B, T, 7 * K), (4, 2, 1), torch.tensor(start)
    got = turned_heads(x, heads, start, FREQUENCIES[:pairs])
    q, k, v = apart(x, heads)
    P = 2 * pairs
    both = [torch.cat([rotate(p[..., :P], start, FREQUENCIES[:pairs]), p[..., P:]], -1) for p in (q, k)]
    weights = [draw(i)(*p.shape).detach() for i, p in enumerate((q, k, v))]
    for mine, want in zip(got, (*both, v), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
    slopes = [
        torch.autograd.grad(sum((p * w).sum() for p, w in zip(parts, weights, strict=True)), x)[0]
        for parts in (got, (*both, v))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def test_second_derivatives(draw):
    x = draw(1)(B, T, 3 * K)
    assert torch.autograd.gradgradcheck(lambda x: turned_heads(x, (1, 1, 1), torch.tensor([0, 5]), FREQUENCIES), x)


def test_turning_keeps_lengths_and_the_last_group(draw):
    x = draw(2)(B, T, 3 * K)
    q, k, v = turned_heads(x, (1, 1, 1), torch.tensor([4, 4]), FREQUENCIES)
    plain = apart(x, (1, 1, 1))
    assert torch.equal(v, plain[2])
    assert not torch.allclose(q, plain[0])
    torch.testing.assert_close(k.norm(dim=-1), plain[1].norm(dim=-1))
