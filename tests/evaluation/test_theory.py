"""Diagnostics: recovery from states, retrieval by hand, signatures, attention forms, norms; gated recurrences."""

import pytest
import torch
from torch import nn

from remanence import ops
from remanence.errors import ShapeError
from remanence.evaluation.benchmarks.retrieval import Count, Index, IsTree, NextLetter
from remanence.evaluation.diagnostics.norms import attention_form, attention_matrix, ssm_norms
from remanence.evaluation.diagnostics.retrieval import by_search, capacity, packed_accuracy, packed_read
from remanence.evaluation.diagnostics.signature import area, signature_cde, stacked_area
from remanence.evaluation.diagnostics.universality import diagonal, reconstruct
from remanence.evaluation.proofs import selectivity, theory
from remanence.memory import make
from remanence.memory.gated_rnn import GatedRNN, as_gated_rnn
from remanence.memory.mamba import Mamba
from remanence.memory.mamba2 import Mamba2
from remanence.ops.signature import signature
from remanence.ops.taps import tap


def normals(seed):
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)


@pytest.mark.parametrize(
    "proof",
    [
        theory.universality,
        theory.retrieval,
        theory.path_signature,
        theory.gated_rnn,
        theory.generalization,
        selectivity.selectivity,
        selectivity.hybrids,
    ],
)
def test_the_claims_hold_and_their_controls_fail(proof):
    system, control = proof()
    assert system.holds, system.says
    assert not control.holds, control.says


def test_a_state_smaller_than_the_input_cannot_give_it_back():
    roots = torch.polar(torch.ones(8).double(), 0.5 + torch.arange(8).double())
    assert reconstruct(diagonal(roots), 16).error < 1e-9
    few = reconstruct(diagonal(roots), 17)
    assert few.error > 0.05
    assert (few.rank, few.unknowns, few.condition) == (16, 17, float("inf"))


def test_layers_whose_gates_see_the_input_are_refused():
    with pytest.raises(ValueError, match="not an affine function"):
        reconstruct(make("min-lstm", 3).double(), 5)


def test_a_linear_layer_can_be_read_back():
    class Shift(GatedRNN):
        def forward(self, x, state=None):
            state = self.begin(x, state)
            h = state["h"]
            for t in range(x.shape[1]):
                h = torch.cat([x[:, t], h[:, : -self.dim]], 1)
            return x, {"h": h}

    layer = Shift(2, width=12).double()
    assert reconstruct(layer, 6).condition == pytest.approx(1)
    assert reconstruct(layer, 6).error < 1e-12
    assert reconstruct(layer, 7).error > 0.1


def test_the_packed_memory_is_exact_up_to_its_bits():
    text = torch.randint(16, (3, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed_read(text, 2, 2, 4), text)
    assert capacity(2, 2, 4) == 16
    assert packed_accuracy(256) == 1
    assert packed_accuracy(258) < 1


@pytest.mark.parametrize(
    "task", [Index(30, 6), NextLetter(30, 40), NextLetter(30, 12, gram=3), Count(30, 5), IsTree(10, 14)], ids=repr
)
def test_a_search_answers_and_another_text_gives_another_answer(task):
    asked = task.ask(60, torch.Generator().manual_seed(1))
    assert torch.equal(by_search(task, asked), asked.answer)
    other = task.ask(60, torch.Generator().manual_seed(2))
    wrong = asked._replace(text=other.text) if not isinstance(task, NextLetter) else None
    if wrong is not None:
        assert not torch.equal(by_search(task, wrong), asked.answer)


@pytest.mark.parametrize(("channels", "depth"), [(1, 3), (2, 2), (3, 2)])
def test_the_dense_equation_is_the_signature(channels, depth):
    dX = normals(0)(4, 25, channels) / 5
    A, start = signature_cde(channels, depth)
    from remanence.ops.linear_cde import linear_cde

    h, _ = linear_cde(dX, A, None, {"h": start.expand(4, -1)})
    torch.testing.assert_close(h[..., 1:], signature(dX, depth)[0])
    assert (h[..., 0] == 1).all()


def test_a_square_encloses_one():
    square = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]], dtype=torch.float64)
    assert float(area(signature(square, 2)[1]["S"])[0, 0, 1]) == pytest.approx(1)
    assert float(stacked_area(square)[0]) == pytest.approx(1)
    assert float(stacked_area(square.flip(1))[0]) == pytest.approx(-1)
    assert float(stacked_area(-square.flip(1))[0]) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["linear-attention", "gla", "retnet", "gated-deltanet", "mamba", "mamba2", "hgrn"])
def test_the_attention_form_is_what_the_recurrence_computes(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = make(name, 8, **({} if name in ("mamba", "mamba2", "hgrn") else {"heads": 2}))
    layer, x = layer.double(), normals(1)(2, 13, 8)
    calls = []

    def handler(call):
        calls.append((call, call.run()))
        return calls[-1][1]

    with torch.no_grad():
        M = attention_form(layer, x)
        with tap(handler):
            layer(x)
        call, (y, _) = next(found for found in calls if found[0].roles)
        value = call.arguments[call.roles.value]
        assert not M.triu(1).any()
        if call.roles.time == 2:
            torch.testing.assert_close(M @ value, y)
        else:
            torch.testing.assert_close(torch.einsum("bdij,bjd->bid", M, value), y)


def test_an_attention_matrix_is_the_outer_product_recurrence():
    draw = normals(2)
    q, k, v, g = draw(2, 20, 3), draw(2, 20, 3), draw(2, 20, 5), -draw(2, 20, 3).abs()
    want, _ = ops.linear_attention(q[:, None], k[:, None], v[:, None], g[:, None])
    torch.testing.assert_close(attention_matrix(g, k, q) @ v, want[:, 0])


def test_layers_without_a_recurrence_have_no_attention_form():
    with pytest.raises(TypeError, match="WindowAttention asks for no recurrence"):
        attention_form(make("sliding-window", 8, heads=2), torch.zeros(1, 4, 8))


def test_norms_of_a_model_layer_by_layer():
    first, second = Mamba(6, states=3), Mamba2(8, state_size=4, head_dim=4)
    model = nn.ModuleDict({"one": first, "two": second})
    with torch.no_grad():
        first.A_log.fill_(0.5)
        second.inward.weight[32:36].zero_()
    rows = ssm_norms(model)
    assert [row["layer"] for row in rows] == ["one", "two"]
    assert rows[0]["abscissa"] == pytest.approx(-(0.5 * torch.ones(())).exp().item())
    assert rows[0]["B"] == pytest.approx(float(torch.linalg.matrix_norm(first.x_proj.weight[1:4].detach(), 2)))
    assert rows[1]["B"] == 0 < rows[1]["C"]
    assert rows[1]["input"] is None
    x = torch.randn(2, 5, 6)
    assert ssm_norms(first, x)[0]["input"] == pytest.approx(float(x.norm(dim=-1).max()))
    with pytest.raises(ValueError, match="no selective state space"):
        ssm_norms(nn.Linear(2, 2))


def test_a_gated_recurrence_of_another_width_keeps_everything_at_root_zero():
    layer = GatedRNN(3, width=7)
    assert layer.initial_state(2)["h"].shape == (2, 7)
    with torch.no_grad():
        layer.root.zero_()
        x = torch.randn(1, 50, 3)
        a, b = layer.inward(x).chunk(2, -1)
        torch.testing.assert_close(layer(x)[1]["h"], (a * b).sum(1))
    with pytest.raises(ValueError, match="width must be at least 1"):
        GatedRNN(3, width=0)


def test_projections_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"got \[2, 3\], \[2, 3\], \[4, 3\], \[4, 4\]"):
        as_gated_rnn(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 3))


@pytest.mark.parametrize(("name", "condition"), [("lssl", 10), ("s4d", 1e9)])
def test_time_invariant_layers_keep_six_tokens_and_legendre_keeps_them_best(name, condition):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = reconstruct(make(name, 2).double(), 6)
    assert found.rank == found.unknowns == 12
    assert found.condition < condition
    assert found.error < 1e-6
