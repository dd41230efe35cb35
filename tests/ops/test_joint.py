"""Parts of one tensor, and gradients that come back side by side."""

from __future__ import annotations

import torch

from remanence.ops import linear_attention
from remanence.ops.joint import blanks, parts

B, T, H = 2, 300, 2
WIDTHS = 8, 8, 6


def heads(part):
    return part.unflatten(-1, (H, -1)).transpose(1, 2)


def joint():
    return torch.randn(B, T, sum(WIDTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attended(x, cut):
    return linear_attention(*(heads(part) for part in cut(x)))[0]


def gradients(cut, create_graph=False, more=lambda q: 0):
    x = joint().requires_grad_()
    y = attended(x, cut)
    y = y.square().sum() + more(cut(x)[1])
    return torch.autograd.grad(y, x, create_graph=create_graph)[0], x


def test_gradients_are_those_of_a_split(monkeypatch):
    joined = []
    real = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *given: joined.append(1) or real(*given))
    found, _ = gradients(lambda x: parts(x, WIDTHS))
    assert not joined
    monkeypatch.undo()
    wanted, _ = gradients(lambda x: x.split(WIDTHS, -1))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_also_where_a_part_is_used_twice_or_alone():
    for more in (lambda k: k.sin().sum(), lambda k: k[:, 3].sum()):
        found, wanted = (
            gradients(cut, more=more)[0] for cut in (lambda x: parts(x, WIDTHS), lambda x: x.split(WIDTHS, -1))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    x = joint().requires_grad_()
    parts(x, WIDTHS)[2].sum().backward()
    assert torch.equal(x.grad, torch.cat([torch.zeros(B, T, 16), torch.ones(B, T, 6)], -1).double())


def test_second_derivatives():
    found = []
    for cut in (lambda x: parts(x, WIDTHS), lambda x: x.split(WIDTHS, -1)):
        grad, x = gradients(cut, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_neighbours_by_chance_are_not_joined():
    """Gradients that lie in one memory in another order, or with something between them, are no whole."""
    x = joint().requires_grad_()
    other = joint()
    q, k, v = other.split(WIDTHS, -1)
    for given in ((k, q, v), (q, q, v)):
        y = parts(x, WIDTHS)
        (found,) = torch.autograd.grad(y, x, given)
        assert torch.equal(found, torch.cat(given, -1))
    (found,) = torch.autograd.grad(parts(x, WIDTHS), x, (q, k, v))
    assert found.data_ptr() == other.data_ptr()


def test_blanks_lie_as_their_models_do():
    q, k, v = (heads(part) for part in parts(joint(), WIDTHS))
    made = blanks(q, k, v)
    assert [m.shape for m in made] == [q.shape, k.shape, v.shape]
    assert made[1].data_ptr() - made[0].data_ptr() == 8 * WIDTHS[0]
    assert len({m.untyped_storage().data_ptr() for m in made}) == 1
    for apart in ((q, v), (k, q, v), (q.contiguous(), k, v), (q, k.float(), v), (q[:, :1], k, v), (q, k)):
        made = blanks(*apart)
        assert [(m.shape, m.dtype) for m in made] == [(x.shape, x.dtype) for x in apart]
        assert len({m.untyped_storage().data_ptr() for m in made}) == len(apart)
