"""The law of the ops: any cuts give the reference's outputs, final state and gradients."""

import pytest
import torch


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def tensors(results):
    """Outputs and the tensors of the final state, in order."""
    *outputs, state = results
    return outputs + [state[name] for name in sorted(state)]


def gradients(results, leaves):
    """Gradients of a loss that gives every number of the outputs and of the final state a weight of its own."""
    loss = 0
    for x in tensors(results):
        if x.is_floating_point():
            loss = loss + (x.double() * torch.arange(1.0, x.numel() + 1).cos().view_as(x)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def in_pieces(op, inputs, cuts, state, axis):
    """Run `op` over the pieces between `cuts`, the state carried from one to the next."""
    found = []
    for part in zip(*(x.tensor_split(cuts, dim=axis) for x in inputs), strict=True):
        *outputs, state = op(*part, state=state)
        found.append(outputs)
    return [torch.cat(x, axis) for x in zip(*found, strict=True)] + [state]


@pytest.fixture(scope="session")
def obeys():
    def check(op, reference, inputs, cuts, state=None, others=(), axis=2, tolerance=1e-9, slopes=True):
        with torch.set_grad_enabled(slopes):
            want = reference(*inputs, state=state)
        given = {} if state is None else {name: x.detach().clone() for name, x in state.items()}
        with torch.set_grad_enabled(slopes):
            got = in_pieces(op, inputs, cuts, state, axis)
        close(tensors(got), tensors(want), tolerance)
        if not slopes:
            return
        held = [] if state is None else [x for x in state.values() if x.is_floating_point()]
        leaves = [*inputs, *others, *held]
        close(gradients(got, leaves), gradients(want, leaves), tolerance)
        for name, before in given.items():
            assert torch.equal(state[name], before), f"the given state's {name!r} was altered"

    return check


@pytest.fixture(scope="session")
def draw():
    """draw(seed)(*shape): float64 noise that wants a gradient."""

    def seeded(seed):
        generator = torch.Generator().manual_seed(seed)
        return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    return seeded


@pytest.fixture(scope="session")
def agrees_in_float32():
    """Forward and gradients in float32 against float64: finite, and within 1e-4 of the largest number."""

    def check(op, inputs, tolerance=1e-4):
        wide = [x.detach().double().requires_grad_() for x in inputs]
        narrow = [x.detach().float().requires_grad_() for x in inputs]
        want, got = op(*wide), op(*narrow)
        for x, y in zip(tensors(got) + gradients(got, narrow), tensors(want) + gradients(want, wide), strict=True):
            assert x.isfinite().all()
            assert (x.double() - y).abs().max() <= tolerance * y.abs().max().clamp(min=1.0)

    return check
