import pytest
import torch

from remanence.ops.rg_lru import by_scan, rg_lru


@pytest.mark.parametrize("T", [1, 2, 61])
def test_one_pass_gives_the_recurrence_and_both_derivatives(draw, T):
    noise = draw(T)
    sizes = [(2, T, 131), (2, T, 131), (2, T, 131), (131,), (2, 131)]
    u, slow, into, rate, start = leaves = [(3 * noise(*s)).detach() for s in sizes]
    rate.copy_(10.0 ** -rate.abs())  # decays from almost 0 to almost 1
    weights, empty = noise(2, T, 131).detach(), torch.tensor([True, False])
    for x in leaves:
        x.requires_grad_()

    def found(op):
        h = op(u, slow, into, rate, empty, start)[0]
        slopes = torch.autograd.grad((h * weights).sum(), leaves, create_graph=True)
        plain = torch.autograd.grad((op(u, slow, into, rate, empty, start)[0] * weights).sum(), leaves)
        second = torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)
        return [h, *plain, *second]

    for got, want in zip(found(rg_lru), found(by_scan), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_float32_is_as_exact_near_a_decay_of_one(draw):
    noise = draw(0)
    inputs = [noise(1, 200, 64).detach() for _ in range(3)] + [torch.full((64,), 1e-5, dtype=torch.float64)]
    rest = [torch.tensor([True]), torch.zeros(1, 64, dtype=torch.float64)]
    want = by_scan(*inputs, *rest)[0]
    got = rg_lru(*(x.float() for x in inputs), rest[0], rest[1].float())[0]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
