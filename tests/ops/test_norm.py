import pytest
import torch

from remanence.errors import ShapeError
from remanence.ops.norm import normalise, normalise_reference

SHAPES = [(2, 3, 300, 16), (1, 1, 1025, 17), (5, 400, 24), (3, 9, 16)]


def inputs(draw, shape, weighted, gated):
    return [draw(0)(*shape), draw(1)(shape[-1]) if weighted else None, draw(2)(*shape) if gated else None]


def compare(x, tolerance, **how):
    used = [t for t in x if t is not None]
    got, want = normalise(*x, **how), normalise_reference(*x, **how)
    assert (got - want).abs().max() < tolerance * (1 + want.abs().max())
    up = torch.cos(torch.arange(want.numel())).view(want.shape).to(want)
    for a, b in zip(torch.autograd.grad(got, used, up), torch.autograd.grad(want, used, up), strict=True):
        assert (a - b).abs().max() < tolerance * (1 + b.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("weighted", "gated"), [(False, False), (True, False), (True, True), (False, True)])
def test_one_pass_is_the_definition(draw, shape, mean, weighted, gated):
    compare(inputs(draw, shape, weighted, gated), 1e-12, mean=mean, eps=1e-5, scale=0.3)


def test_float32(draw):
    compare([t.detach().float().requires_grad_() for t in inputs(draw, SHAPES[0], True, True)], 1e-5)


def test_zeros_have_a_gradient_that_is_finite(draw):
    x = torch.zeros(1, 2, 600, 16).requires_grad_()
    (grad,) = torch.autograd.grad(normalise(x, mean=False).sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 2, 1, 0), (2, 1, 0, 3)])
def test_views_are_read_in_place(draw, order):
    x, weight, gate = inputs(draw, (3, 20, 30, 16), True, True)
    views = [t.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist()) for t in (x, gate)]
    views = [t.detach().requires_grad_() for t in views]
    y, want = normalise(views[0], weight, views[1]), normalise_reference(x, weight, gate)
    torch.testing.assert_close(y, want)
    for a, b in zip(torch.autograd.grad(y.sum(), views), torch.autograd.grad(want.sum(), [x, gate]), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_those_of_the_definition(draw):
    x, weight, gate = inputs(draw, (1, 4, 300, 16), True, True)

    def twice(op):
        (first,) = torch.autograd.grad(op(x, weight, gate, scale=3.0).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, weight, gate])

    for a, b in zip(twice(normalise), twice(normalise_reference), strict=True):
        torch.testing.assert_close(a, b)


def test_a_weight_of_another_width_is_refused(draw):
    with pytest.raises(ShapeError, match="features=16"):
        normalise(draw(0)(2, 16), draw(1)(8))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("activation", [torch.sigmoid, torch.nn.functional.silu, torch.tanh])
@pytest.mark.parametrize(("biased", "gated"), [(False, True), (True, False), (True, True)])
def test_a_weight_and_a_bias_of_each_head(draw, centred, activation, biased, gated):
    x, gate = draw(0)(2, 150, 3, 16), draw(1)(2, 150, 3, 16) if gated else None
    weight, bias = draw(2)(3, 16), draw(3)(3, 16) if biased else None
    used = [t for t in (x, weight, bias, gate) if t is not None]
    how = {"bias": bias, "centred": centred, "activation": activation, "eps": 1e-3}
    got, want = normalise(x, weight, gate, **how), normalise_reference(x, weight, gate, **how)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    up = torch.cos(torch.arange(want.numel())).view(want.shape).to(want)
    found, wanted = torch.autograd.grad(got, used, up), torch.autograd.grad(want, used, up)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_centred_it_is_the_group_norm_of_pytorch(draw):
    x, weight, bias = draw(0)(40, 24), draw(1)(24), draw(2)(24)
    heads = [t.view(3, 8) for t in (weight, bias)]
    got = normalise(x.view(40, 3, 8), heads[0], bias=heads[1], centred=True, eps=1e-4).flatten(1)
    torch.testing.assert_close(got, torch.nn.functional.group_norm(x, 3, weight, bias, 1e-4))


def test_second_derivatives_with_heads(draw):
    x, weight, bias = draw(0)(2, 9, 3, 8), draw(1)(3, 8), draw(2)(3, 8)

    def twice(op):
        y = op(x, weight, bias=bias, centred=True)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, weight, bias])

    for a, b in zip(twice(normalise), twice(normalise_reference), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_other_heads_are_refused(draw):
    with pytest.raises(ShapeError, match="heads=3, features=8"):
        normalise(draw(0)(2, 5, 3, 8), draw(1)(2, 8))
