"""The Triton kernels against the loops: through Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
import torch.nn.functional as F

from remanence.ops import (
    dispatch,
    gated_delta_rule,
    gated_delta_rule_reference,
    linear_attention,
    linear_attention_reference,
    scan,
    scan_reference,
)

pytest.importorskip("triton", reason="Triton is not installed: pip install 'remanence[triton]'")

GPU = torch.cuda.is_available()
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.float32, 1e-4) if GPU else ("cpu", torch.float64, 1e-9)


def through_triton(op, **options):
    """The op by its kernels, from and to tensors like the loop's."""

    def run(*inputs, state=None):
        given = None if state is None else {name: x.to(DEVICE, DTYPE) for name, x in state.items()}
        with dispatch.triton_everywhere():
            y, state = op(*(x.to(DEVICE, DTYPE) for x in inputs), state=given, **options)
        return y.cpu().double(), {name: x.cpu().double() for name, x in state.items()}

    return run


def hard(inputs):
    """The last input, a log decay, with nothing forgotten at some tokens and all of it at others."""
    *others, g = inputs
    dice = torch.rand(g.shape, generator=torch.Generator().manual_seed(0))
    g = g.detach().masked_fill(dice < 0.2, 0.0).masked_fill(dice > 0.8, -13.8).masked_fill(dice > 0.95, -1e4)
    return [*others, g.requires_grad_()]


def test_where_the_kernels_run():
    assert not dispatch.triton(torch.ones(3))
    with dispatch.triton_everywhere():
        assert dispatch.triton(torch.ones(3))
    assert not dispatch.triton(torch.ones(3))


def decays_and_inputs(draw, T, B=2, D=5):
    noise = draw(T)
    b = noise(B, T, D)
    return [b, (-3 * noise(B, T, D).abs()).detach().requires_grad_()]


def scan_last(op):
    """A scan whose log decay is its last input, as it is in the other ops."""
    return lambda b, g, state=None: op(g, b, state=state)


@pytest.mark.parametrize(("T", "cuts", "D"), [(2, [], 5), (37, [10], 5), (67, [], 130)])
def test_scan(obeys, draw, T, cuts, D):
    inputs = hard(decays_and_inputs(draw, T, D=D))
    state = {"h": draw(9)(2, D)}
    obeys(scan_last(through_triton(scan)), scan_last(scan_reference), inputs, cuts, state, axis=1, tolerance=TOLERANCE)


def test_the_law_notices_a_lost_state(obeys, draw):
    def forgetful(b, g, state=None):
        return through_triton(scan)(g, b)

    with pytest.raises(AssertionError):
        obeys(forgetful, scan_last(scan_reference), decays_and_inputs(draw, 8), [4], axis=1)


B, H, K, V = 1, 2, 5, 3
DECAYS = ["none", "head", "key"]


def outer_products(draw, T, decay, K=K, V=V):
    noise = draw(T)
    q, k, v = noise(B, H, T, K), noise(B, H, T, K), noise(B, H, T, V)
    shape = {"none": None, "head": (B, H, T), "key": (B, H, T, K)}[decay]
    return [q, k, v] if shape is None else hard([q, k, v, (-noise(*shape).abs()).detach().requires_grad_()])


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("T", "chunk_size", "cuts"), [(2, 64, []), (37, 16, [20]), (68, 64, [])])
def test_linear_attention(obeys, draw, decay, T, chunk_size, cuts):
    op = through_triton(linear_attention, chunk_size=chunk_size)
    state = {"S": draw(9)(B, H, K, V)}
    obeys(op, linear_attention_reference, outer_products(draw, T, decay), cuts, state, tolerance=TOLERANCE)


@pytest.mark.parametrize("decay", ["head", "key"])
def test_linear_attention_with_features_for_several_blocks(obeys, draw, decay):
    op = through_triton(linear_attention, chunk_size=16)
    obeys(op, linear_attention_reference, outer_products(draw, 20, decay, K=40, V=40), [], tolerance=TOLERANCE)


def writes(draw, T, decay=True, K=K, V=V):
    noise = draw(T)
    key = F.normalize(noise(B, H, T, K).detach(), dim=-1).requires_grad_()
    beta = (2 * noise(B, H, T).detach().sigmoid()).requires_grad_()
    x = [noise(B, H, T, K), key, noise(B, H, T, V), beta]
    return hard([*x, (-0.3 * noise(B, H, T).detach().abs()).requires_grad_()]) if decay else x


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(("T", "chunk_size", "cuts"), [(2, 64, []), (37, 16, [20]), (100, 64, []), (40, 32, [])])
def test_gated_delta_rule(obeys, draw, decay, T, chunk_size, cuts):
    op = through_triton(gated_delta_rule, chunk_size=chunk_size)
    state = {"S": draw(9)(B, H, K, V)}
    obeys(op, gated_delta_rule_reference, writes(draw, T, decay), cuts, state, tolerance=TOLERANCE)


def test_gated_delta_rule_with_features_for_several_blocks(obeys, draw):
    op = through_triton(gated_delta_rule, chunk_size=16)
    obeys(op, gated_delta_rule_reference, writes(draw, 20, K=40, V=40), [], tolerance=TOLERANCE)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_hard_triangular_systems_in_float32(agrees_in_float32, beta, spread):
    """Keys that (nearly) repeat and full writes: the chunk's system is as far from the identity as it gets."""
    noise = torch.Generator().manual_seed(1)
    keys = F.normalize(torch.ones(1, 1, 1, 16) + spread * torch.randn(1, 1, 128, 16, generator=noise), dim=-1)
    q, v = torch.randn(1, 1, 128, 16, generator=noise), torch.randn(1, 1, 128, 8, generator=noise)

    def op(*x):
        if x[0].dtype == torch.float64:
            return gated_delta_rule_reference(*x)
        with dispatch.triton_everywhere():
            y, state = gated_delta_rule(*(t.to(DEVICE) for t in x))
        return y.cpu(), {"S": state["S"].cpu()}

    agrees_in_float32(op, [q, keys, v, torch.full((1, 1, 128), beta)])


CASES = {
    "gated delta rule": (gated_delta_rule, lambda draw: writes(draw, 20)),
    "linear attention": (linear_attention, lambda draw: outer_products(draw, 20, "head")),
    "linear attention, decay per key": (linear_attention, lambda draw: outer_products(draw, 20, "key")),
}


def found_by(op, inputs, dtype=DTYPE, lay=lambda x: x):
    leaves = [lay(x.detach().to(DEVICE, dtype)).requires_grad_() for x in inputs]
    with dispatch.triton_everywhere():
        y, state = op(*leaves)
    weighted = [
        (x.double() * torch.arange(1.0, x.numel() + 1, device=x.device).cos().view_as(x)).sum() for x in (y, state["S"])
    ]
    return y, state["S"], *torch.autograd.grad(weighted, leaves)


@pytest.mark.parametrize("name", CASES)
def test_views_are_read_in_place(draw, name):
    op, inputs = CASES[name]
    inputs = inputs(draw)
    want = found_by(op, inputs)
    ways = [lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.stack([x, -x], -1)[..., 0]]
    for lay in ways:
        for got, wanted in zip(found_by(op, inputs, lay=lay), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_follows_float32(draw, name):
    op, inputs = CASES[name]
    inputs = [x.detach().bfloat16() for x in inputs(draw)]
    got, want = found_by(op, inputs, torch.bfloat16), found_by(op, inputs, torch.float32)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32] + len(inputs) * [torch.bfloat16]
    for x, y in zip(got, want, strict=True):
        assert (x.float() - y).abs().max() <= 0.02 * y.abs().max()


def twice(op, inputs):
    y = op(*inputs)[0]
    once = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(x.sin().sum() for x in once), inputs)


@pytest.mark.parametrize(
    ("op", "reference", "inputs"),
    [
        (scan_last(through_triton(scan)), scan_last(scan_reference), lambda draw: decays_and_inputs(draw, 4)),
        (
            through_triton(linear_attention, chunk_size=16),
            linear_attention_reference,
            lambda draw: outer_products(draw, 20, "key"),
        ),
        (
            through_triton(gated_delta_rule, chunk_size=16),
            gated_delta_rule_reference,
            lambda draw: writes(draw, 20),
        ),
    ],
    ids=["scan", "linear attention", "gated delta rule"],
)
def test_second_derivatives_are_those_of_the_loop(draw, op, reference, inputs):
    x = inputs(draw)
    for got, want in zip(twice(op, x), twice(reference, x), strict=True):
        torch.testing.assert_close(got, want, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)
