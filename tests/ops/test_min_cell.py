import pytest
import torch

from remanence.ops.min_cell import by_scan, min_cell


def found(op, gates, z, start, weights):
    h = op(z, gates, start)
    slopes = torch.autograd.grad((h * weights).sum(), [z, start], create_graph=True)
    return [h, *slopes, *torch.autograd.grad(sum(s.square().sum() for s in slopes), [z, start])]


@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("T", [1, 2, 61])
def test_one_pass_gives_the_recurrence_and_both_derivatives(draw, gates, T):
    noise = draw(T)
    z, start, weights = 4 * noise(2, T, (gates + 1) * 131), noise(2, 131), noise(2, T, 131).detach()
    z = z.detach().requires_grad_()
    for got, want in zip(*(found(op, gates, z, start, weights) for op in (min_cell, by_scan)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gates", [1, 2])
def test_gates_that_are_shut_or_open_keep_or_replace(draw, gates):
    z = torch.zeros(1, 2, gates + 1, 3)
    z[:, 0, -2], z[:, 1, -2] = 200.0, -200.0  # written, then not
    if gates == 2:
        z[:, 0, 0], z[:, 1, 0] = -200.0, 200.0
    z[:, :, -1] = torch.tensor([[2.0], [7.0]])
    h = min_cell(z.flatten(2), gates, torch.ones(1, 3))
    torch.testing.assert_close(h, torch.full((1, 2, 3), 2.5))
