"""Proofs of what theory says of linear recurrences: exact constructions, and the part that each needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.evaluation.benchmarks.retrieval import Count, Index, IsTree, NextLetter, TextTask
from remanence.evaluation.diagnostics.family_tree import family, walk
from remanence.evaluation.diagnostics.norms import attention_form, attention_matrix
from remanence.evaluation.diagnostics.reductions import REDUCTIONS
from remanence.evaluation.diagnostics.retrieval import by_search, capacity, packed_accuracy
from remanence.evaluation.diagnostics.signature import signature_cde, stacked_area
from remanence.evaluation.diagnostics.universality import diagonal, reconstruct
from remanence.evaluation.proofs.linear import gap, normals, seeded
from remanence.memory.gated_rnn import as_gated_rnn
from remanence.memory.mamba import Mamba
from remanence.ops.linear_cde import linear_cde
from remanence.ops.selective_scan import selective_scan
from remanence.ops.signature import signature


@proof(
    "linear-rnn-universality",
    "64 numbers read are all in the last state when the eigenvalues lie on the unit circle; inside it they fade.",
)
def universality() -> tuple[Check, Check]:
    angle = torch.arange(64, dtype=torch.float64) * (2 * math.pi / 64)

    def check(radius: float) -> Check:
        found = reconstruct(diagonal(torch.polar(torch.full_like(angle, radius), angle)), 64)
        return Check(
            found.error < 1e-10 and found.noisy_error < 1e-4,
            f"radius {radius:g}: error {found.error:.0e}, with 1e-6 of noise {found.noisy_error:.0e}, "
            f"condition {found.condition:.0e}",
        )

    near, inside = check(0.98), check(0.6)
    return Check(check(1.0).holds and near.holds, f"{check(1.0).says}; {near.says}"), inside


@proof(
    "rnn-in-context-retrieval",
    "A memory answers every place of a text until the text has more bits than its state; a search answers all.",
)
def retrieval() -> tuple[Check, Check]:
    bits = capacity()
    sweep = (128, 192, 255, 256, 257, 320, 512)
    packed = {n: packed_accuracy(n) for n in sweep}
    at_capacity = all((share == 1) == (8 * n <= bits) for n, share in packed.items())
    tasks: list[TextTask] = [Index(120), NextLetter(120, 200), NextLetter(120, 32, gram=3), Count(120), IsTree(24)]
    right = []
    for i, task in enumerate(tasks):
        asked = task.ask(50, torch.Generator().manual_seed(i))
        right.append(float((by_search(task, asked) == asked.answer).double().mean()))
    falls = ", ".join(f"{share:.2f} at {8 * n}" for n, share in packed.items())
    searched = Check(
        at_capacity and min(right) == 1,
        f"searching: {min(right):.2f} right at worst, of 5 tasks; the memory of {bits} bits falls just beyond them",
    )
    return searched, Check(min(packed.values()) == 1, f"without search, right answers by bits of text: {falls}")


@proof(
    "selective-ssm-signature",
    "Dense input-driven transitions hold the area under a path; commuting (diagonal) ones hold its end point only.",
)
def path_signature() -> tuple[Check, Check]:
    dX = normals(3)(1, 200, 2) / 200**0.5
    turned = dX.flip(1)  # the same steps in the opposite order: equal ends, another area
    A, start = signature_cde(2, 2)
    draw = normals(1)

    def signed(d: Tensor) -> float:
        two = signature(d, 2)[1]["S"][0, 2:].view(2, 2)
        return float((two[0, 1] - two[1, 0]) / 2)

    areas = [signed(d) for d in (dX, turned)]

    def check(A: Tensor, h: Tensor) -> Check:
        ends = [linear_cde(d, A, None, {"h": h[None]})[1]["h"] for d in (dX, turned)]
        apart = gap(*ends)
        figures = f"areas {areas[0]:.2f} and {areas[1]:.2f}, equal ends: states {apart:.0e} apart"
        return Check(apart > 0.5 * abs(areas[0] - areas[1]), figures)

    x = torch.cat([torch.zeros_like(dX[:, :1]), dX.cumsum(1)], 1)[0]
    direct = float(((x[:-1, 0] * dX[0, :, 1]) - (x[:-1, 1] * dX[0, :, 0])).sum() / 2)
    whole = linear_cde(dX, A, None, {"h": start[None]})[1]["h"][0, 1:]
    error = max(
        gap(whole, signature(dX, 2)[1]["S"][0]), abs(areas[0] - direct), abs(float(stacked_area(dX)[0]) - direct)
    )
    dense, diagonals = check(A, start), check(draw(2, 7), draw(7))
    system = Check(
        dense.holds and error < 1e-12,
        f"signature, dense equation, two stacked layers and direct sum agree to {error:.0e}; {dense.says}",
    )
    return system, diagonals


@proof(
    "gated-rnn-attention",
    "Multiplied inputs and outputs make a diagonal recurrence linear attention; one gate fewer and it is not.",
)
def gated_rnn() -> tuple[Check, Check]:
    draw = normals(2)
    query, key, value = (draw(4, 6) for _ in range(3))
    x = draw(16, 40, 6)
    rnn = as_gated_rnn(query, key, value, out=draw(6, 4))
    q, k, v = ((x @ w.mT)[:, None] for w in (query, key, value))
    want = ops.linear_attention(q, k, v)[0][:, 0]
    with torch.no_grad():
        exact = gap(rnn(x)[0], want @ rnn.out.weight[:, :4].mT)
        a, b = rnn.inward(x).chunk(2, -1)
        gate = rnn.gate(x)

    def residual(features: Tensor) -> float:
        """What the best linear readout of these features leaves of the attention's output."""
        flat, target = features.flatten(0, 1), want.flatten(0, 1)
        left = target - flat @ torch.linalg.lstsq(flat, target, driver="gelsd").solution
        return float(left.norm() / target.norm())

    both, no_output = residual((a * b).cumsum(1) * gate), residual((a * b).cumsum(1))
    no_input = residual(torch.cat([a, b], -1).cumsum(1) * gate.repeat(1, 1, 2))

    # in-context regression: tokens (x_i, y_i), then (x, 0): one step of gradient descent from zero weights
    d, rate = 5, 0.1
    pairs, asked = draw(1, 20, d + 1), draw(1, 1, d + 1)
    asked[..., -1] = 0
    first, last = torch.eye(d + 1).double()[:d], torch.eye(d + 1).double()[d:]
    learner = as_gated_rnn(rate * first, first, last, out=last.mT)
    weights = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    loss = (pairs[0, :, d] - pairs[0, :, :d] @ weights).square().sum() / 2
    step = -rate * torch.autograd.grad(loss, weights)[0]
    with torch.no_grad():
        guess = learner(torch.cat([pairs, asked], 1))[0][0, -1, d]
    descent = gap(guess, asked[0, 0, :d] @ step)
    system = Check(
        max(exact, descent, both) < 1e-10,
        f"{exact:.0e} from linear attention, {descent:.0e} from a step of gradient descent",
    )
    control = Check(
        min(no_input, no_output) < 0.5,
        f"residual of the best readout {no_input:.2f} without the input gate, {no_output:.2f} without the output gate",
    )
    return system, control


@proof(
    "ssm-generalization",
    "With a stable state matrix no token weighs more in longer texts, and the gap between training and test stays.",
)
def generalization() -> tuple[Check, Check]:
    layer = seeded(lambda: Mamba(4, states=3), 3)
    short = normals(4)(1, 30, 4)
    with torch.no_grad():
        M = attention_form(layer, short)
        u = F.silu(layer.conv(layer.in_proj(short).chunk(2, -1)[0])[0])
        dt, B, C = layer.x_proj(u).split([layer.rank, 3, 3], -1)
        direct, _ = selective_scan(u, F.softplus(layer.dt_proj(dt)), -layer.A_log.exp(), B, C)
    form = gap(torch.einsum("bdij,bjd->bid", M, u), direct) / float(direct.abs().max())

    lengths = (50, 200, 800)
    maps = normals(5)(2, 4, 16) / 2

    def gates(many: int, T: int, abscissa: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = normals(seed)(many, T, 4)
        delta = F.softplus(x[..., 3:])
        return abscissa * delta, delta * (x @ maps[0]), x @ maps[1], x[..., :1]

    def last(decay: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
        left = decay.flip(1).cumsum(1).flip(1) - decay  # what each token has still to decay
        return (left.exp() * B * x).sum(1).mean(0)

    def check(abscissa: float) -> Check:
        rows, gaps = [], []
        for T in lengths:
            decay, B, C, x = gates(128, T, abscissa, 6)
            rows.append(float(attention_matrix(decay[0], B[0], C[0]).abs().sum(-1).max()))
            # training and test means differ by this much for the worst readout of norm 1
            test = last(decay, B, C, x)
            trained = [last(*gates(16, T, abscissa, seed)) for seed in range(7, 15)]
            gaps.append(sum(float((t - test).norm()) for t in trained) / len(trained))
        figures = (
            f"abscissa {abscissa:g}: row sums {', '.join(f'{r:.3g}' for r in rows)}; "
            f"train-test gaps {', '.join(f'{x:.2f}' for x in gaps)} at lengths {', '.join(map(str, lengths))}"
        )
        return Check(rows[-1] < 3 * rows[0] and gaps[-1] < 2 * gaps[0] and form < 1e-9, figures)

    stable = check(-0.5)
    return Check(stable.holds, f"{stable.says}; attention form exact to {form:.0e}"), check(0.0)


@proof("survey-s4", "Eight edges of the family tree are equations: a member with its change undone is its relative.")
def family_tree() -> tuple[Check, Check]:
    errors = {f"{a} = {b}": reduce() for (a, b), reduce in REDUCTIONS.items()}
    members = {member.id for _, member in walk(family())}
    joined = all(end in members for pair in REDUCTIONS for end in pair)

    def check(which: int) -> Check:
        worst = max(errors.values(), key=lambda pair: pair[which])[which]
        least = min(errors.items(), key=lambda item: item[1][which])
        return Check(
            joined and least[1][which] < 1e-9 and worst < (1e-9 if which == 0 else math.inf),
            f"{len(errors)} pairs, errors from {least[1][which]:.0e} ({least[0]}) to {worst:.0e}",
        )

    return check(0), check(1)  # the control lets what was changed stay
