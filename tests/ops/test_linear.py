"""The product of projections: the compiled form against PyTorch's, and when which runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from remanence.ops import linear
from remanence.ops.linear import _panel
from remanence.ops.product_kernels import BYTES


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The kernels run on any processor here, also where they would not be chosen."""
    monkeypatch.setattr("remanence.ops.product_kernels.FASTER", True)
    _panel.cache_clear()
    yield
    _panel.cache_clear()


@pytest.fixture
def products(monkeypatch):
    """How often PyTorch's product ran."""
    calls = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda *given: calls.append(1) or plain(*given))
    return calls


def panels(dtype, count):
    return 2 * BYTES // dtype.itemsize * count


@pytest.mark.parametrize("tokens", [64, 257, 1031])
@pytest.mark.parametrize(("inner", "outer"), [(1, 3), (40, 2), (17, 20), (8.5, 2), (3, 9.25), (10.75, 8.125)])
def test_equals_pytorch(tokens, inner, outer, products):
    dtype = torch.float64
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, int(panels(dtype, inner)), generator=g, dtype=dtype)
    x.requires_grad_()
    weight = torch.randn(int(panels(dtype, outer)), x.shape[2], generator=g, dtype=dtype, requires_grad=True)
    bias = torch.randn(len(weight), generator=g, dtype=dtype, requires_grad=True)
    y = linear(x, weight, bias)
    assert not products
    expected = torch.einsum("bti,oi->bto", x, weight) + bias
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    given = torch.randn(y.shape, generator=g, dtype=dtype)
    found = torch.autograd.grad(y, (x, weight, bias), given)
    wanted = torch.autograd.grad(expected, (x, weight, bias), given)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_views_and_broadcast_gradients():
    """Rows that lie within wider ones, turned tensors, and the gradient of a sum, whose numbers are all one number."""
    dtype, width = torch.float32, panels(torch.float32, 2)
    wide = torch.randn(2, 600, 3 * width, dtype=dtype)
    weight = torch.randn(width, width, requires_grad=True)
    for x in (wide[..., width : 2 * width], wide[..., :width].mT.contiguous().mT):
        x = x.detach().requires_grad_()
        y = linear(x, weight)
        torch.testing.assert_close(y, x @ weight.mT, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(y.sum(), (x, weight))
        wanted = torch.autograd.grad((x @ weight.mT).sum(), (x, weight))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_second_derivatives():
    dtype, width = torch.float64, panels(torch.float64, 1)
    x = torch.randn(2**15 // width, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, width, dtype=dtype, requires_grad=True)

    def curvature(product):
        (d_x,) = torch.autograd.grad(product(x, weight).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(d_x.square().sum(), (x, weight))

    for a, b in zip(curvature(linear), curvature(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_the_kernels_cannot_take_goes_to_pytorch(products, as_shipped):
    panel = panels(torch.float32, 1)
    x, weight = torch.randn(2**15, panel), torch.randn(panel, panel)
    linear(x[:8], weight)  # few numbers
    linear(x, weight[:-1])  # few columns that make no panel
    linear(x.bfloat16(), weight.bfloat16())
    linear(x, weight.mT)  # rows that are not contiguous
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert len(products) == 5
    with pytest.raises(RuntimeError):
        linear(x, torch.randn(panel, 2 * panel))
    linear(x, weight)
    assert len(products) == 6


def test_of_no_tokens():
    panel = panels(torch.float64, 1)
    x, weight = torch.randn(2, 0, panel, dtype=torch.float64), torch.randn(panel, panel, dtype=torch.float64)
    weight.requires_grad_()
    y = linear(x, weight)
    assert y.shape == (2, 0, panel)
    (found,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(found, torch.zeros_like(weight))


def test_the_threads_do_not_matter():
    panel = panels(torch.float32, 4)
    x, weight = torch.randn(3000, panel), torch.randn(panel, panel)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
