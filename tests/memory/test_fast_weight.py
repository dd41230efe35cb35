from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import RemanenceError, UnknownName
from remanence.memory import make
from remanence.memory.base import ragged
from remanence.memory.fast_weight import GATES, KEPT, OPTIMIZERS, ROWS, STRUCTURES, FastWeightMemory
from remanence.memory.miras import Memora, Moneta, Yaad
from remanence.memory.titans import Titans
from remanence.ops.fast_weight import READS
from remanence.ops.objectives import OBJECTIVES, Huber, PNorm
from remanence.ops.retention import RETENTIONS, Lq
from remanence.state import flatten


def build(kind=FastWeightMemory, seed=0, **answers):
    torch.manual_seed(seed)
    return kind(**{"dim": 8, "heads": 2, "expand": 2, "chunk_size": 4} | answers).double()


def draw(T, batch=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, T, 8, generator=g, dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


ANSWERS = {
    "structure": st.sampled_from(STRUCTURES),
    "objective": st.sampled_from(list(OBJECTIVES)),
    "retention": st.sampled_from([*KEPT, *RETENTIONS]),
    "optimizer": st.sampled_from(list(OPTIMIZERS)),
    "read": st.sampled_from(READS),
    "chunk_size": st.integers(1, 5),
    "layers": st.integers(1, 4),
    "window": st.integers(1, 3),
    "norm": st.booleans(),
    "residual": st.booleans(),
    "gates": st.sampled_from(GATES),
}


@settings(max_examples=60, deadline=None)
@given(answers=st.fixed_dictionaries(ANSWERS), cut=st.integers(0, 9))
def test_any_combination_runs_and_resumes_or_says_why(answers, cut):
    try:
        memory = build(**answers)
    except ValueError as error:
        why = str(error)
    else:
        why = None
    if why is not None:
        hidden = answers["structure"] == "mlp" and answers["layers"] > 2 and answers["gates"] == "channel"
        dot = (answers["objective"], answers["retention"]) == ("dot", "none")
        assert answers["structure"] == "vector" or dot or hidden
        assert why.startswith("FastWeightMemory: ")
        assert why.endswith(".")
        return
    x = draw(9)
    want, end = memory(x)
    first, state = memory(x[:, :cut])
    second, state = memory(x[:, cut:], state)
    assert want.isfinite().all()
    close(torch.cat([first, second], 1), want)
    close(flatten(state), flatten(end))


@pytest.mark.parametrize("name", ROWS)
def test_every_row_learns_what_it_reads(name):
    more = {"max_step": 2.0} if name == "dla" else {}
    memory, x = build(**ROWS[name] | {"chunk_size": 1} | more), draw(1).expand(2, 60, 8)
    with torch.no_grad():
        if name == "dla":
            memory.gates.bias[:2] = 1.0  # its steps are what the decay undoes
        y, state = memory(x)
        k, v = (p[:, -1].unflatten(-1, (2, -1))[:, :, None] for p in mixed(memory, x)[1:])
        before = memory.recall(torch.nn.functional.normalize(k, dim=-1), memory.initial_state(2))
        after = memory.recall(torch.nn.functional.normalize(k, dim=-1), state)
    assert y.isfinite().all()
    if memory.objective.targets:
        assert (memory.objective.loss(after, v) < memory.objective.loss(before, v)).all()
    else:
        agree = torch.nn.functional.cosine_similarity
        assert (agree(after, v, -1) > agree(before, v, -1)).all()


def mixed(memory, x):
    out, _ = memory.conv(memory.qkv(x), memory.conv.initial_state(len(x)), silu=True)
    return out.chunk(3, -1)


@pytest.mark.parametrize("kind", [Titans, Moneta, Yaad, Memora])
def test_a_named_system_is_its_row(kind):
    x, chunk = draw(9), ROWS[kind.__name__.lower()].get("chunk_size", 16)
    gates = {} if kind is Titans else {"gates": "channel"}
    same = build(kind, chunk_size=chunk), build(**gates, **ROWS[kind.__name__.lower()] | {"chunk_size": chunk})
    assert torch.equal(same[0](x)[0], same[1](x)[0])


def test_moneta_of_two_and_two_is_plain_descent():
    x = draw(9)
    two, plain = build(Moneta, p=2, q=2, max_step=0.05), build(norm=True, max_step=0.1, gates="channel")
    close(two(x)[0], plain(x)[0], 1e-6)  # the p-norm's slope is 2e, of |e| smoothed at 10⁻³
    assert (build(Moneta)(x)[0] - plain(x)[0]).abs().max() > 1e-3


def test_memora_keeps_probabilities_on_any_stream():
    memory = build(Memora)
    with torch.no_grad():
        y, state = memory(100 * draw(300))
    for A in state["net"]["weight"].values():
        rows = memory.retention.link(A)
        assert A.isfinite().all()
        assert (rows >= 0).all()
        close(rows.sum(-1), torch.ones_like(rows[..., 0]), 1e-12)
    assert y.isfinite().all()


def test_thresholds_follow_the_token():
    memory, x = build(objective=Huber("norm", 0.3)), draw(5)
    with torch.no_grad():
        memory.gates.bias[memory.sizes[0] + memory.sizes[1] :] = 40.0
        close(memory.gate(x)["threshold"], torch.full((2, 2, 5), 0.6, dtype=torch.float64), 1e-6)


def test_rows_of_different_lengths_read_as_if_alone():
    memory, x = build(optimizer="momentum2", window=3, objective="huber"), draw(11, 3)
    y, state = ragged(memory, x, [11, 4, 7])
    for i, n in enumerate([11, 4, 7]):
        alone, end = memory(x[i : i + 1, :n])
        close(y[i : i + 1, :n], alone)
        close({k: t[i : i + 1] for k, t in flatten(state).items()}, flatten(end))


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"structure": "vector", "optimizer": "muon"}, "'muon' needs a matrix"),
        (
            {"structure": "vector", "retention": "softmax"},
            "'softmax' shares a norm or a sum .* those of structure 'vector'",
        ),
        ({"structure": "vector", "norm": True}, "norm needs outputs of several features"),
        ({"objective": "dot", "retention": "none"}, "outgrows all numbers unless a retention forgets"),
        ({"max_step": 0.0}, "max_step must be above 0 and finite, got 0.0"),
        ({"max_step": 3.0, "bound": None}, "max_step must be at most 2, beyond which"),
        ({"bound": 2.5}, "bound must be above 0 and at most 2"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"window": 0}, "window=0"),
        ({"gates": "channel", "layers": 3}, "gates 'channel' have no side .* structure 'mlp' with layers=3"),
        ({"gates": "channel", "rank": 0}, "rank=0"),
    ],
)
def test_what_cannot_work_says_why(answers, said):
    with pytest.raises(ValueError, match=said):
        build(**answers)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"objective": "hubber"}, "objective called 'hubber'; did you mean 'huber'"),
        ({"retention": "decy"}, "did you mean 'decay'"),
        ({"structure": "matrices"}, "did you mean 'matrix'"),
        ({"optimizer": "momentum3"}, "did you mean 'momentum"),
        ({"gates": "chanel"}, "did you mean 'channel'"),
    ],
)
def test_unknown_answers_name_the_nearest(answers, said):
    with pytest.raises(UnknownName, match=said):
        build(**answers)


def test_channels_forget_apart():
    """Two channels of four forget at once; what the layer gives in the other two is as if none did."""
    answers = {"structure": "matrix", "gates": "channel", "optimizer": "momentum", "bound": None, "max_step": 0.01}
    memory, free, x = build(**answers), build(**answers), draw(12)
    with torch.no_grad():
        bias = dict(zip(memory.names, memory.gates.bias.split(memory.sizes), strict=True))["retain"].view(2, 4)
        bias[:] = 60.0
        dict(zip(free.names, free.gates.bias.split(free.sizes), strict=True))["retain"][:] = 60.0
        bias[:, 2:] = -60.0
    kept, lost = (m(x)[1]["net"]["weight"]["0"] for m in (free, memory))
    assert lost[:, :, 2:].abs().max() < 0.3 * kept[:, :, 2:].abs().max()
    learned = (kept - memory.start[0])[:, :, :2]
    assert (lost - kept)[:, :, :2].abs().max() < 0.5 * learned.abs().max()


@pytest.mark.parametrize("objective", ["dot", "squared"])
def test_what_is_forgotten_turns_into_the_start(objective):
    """Where every step is zero, decay ends in nothing and the retention "start" in the weights it was born with."""
    ends, q = {}, torch.nn.functional.normalize(draw(6).view(2, 2, 6, 4), dim=-1)
    for retention in ("decay", "start"):
        memory = build(retention=retention, objective=objective, max_step=1e-9, residual=False)
        with torch.no_grad():
            memory.gates.bias[:2] = -3.0
            first = memory.recall(q, memory.initial_state(2))
            ends[retention] = (memory.recall(q, memory(draw(200))[1]) / first).log().abs().max()
    assert ends["start"] < 1e-6
    assert ends["decay"] > 10


def test_a_start_that_is_returned_to_is_learned():
    memory = build(retention="start")
    memory(draw(9))[0].square().sum().backward()
    assert all(W.grad.abs().max() > 1e-6 for W in memory.start)


def test_queries_and_keys_are_lifted_together():
    class Doubled(FastWeightMemory):
        def lift(self, *vectors):
            seen.append(len(vectors))
            return [2 * x for x in super().lift(*vectors)]

    seen, x = [], draw(6)
    twice, once = build(Doubled, structure="matrix", bound=None), build(structure="matrix", bound=None)
    assert (twice(x)[0] - once(x)[0]).abs().max() > 1e-4
    assert seen == [2]


def test_divergence_names_the_layer_and_the_bound():
    memory = build(bound=None, max_step=2.0, chunk_size=8).float()
    with torch.no_grad():
        memory.gates.bias[2:4] = 9.0
    with pytest.raises(RemanenceError, match=r"weight of layer \d .* stable for steps below 0.25"):
        memory(30 * draw(1).float().expand(2, 400, 8))
    held = build(bound=0.5, max_step=2.0, chunk_size=8).float()
    held.load_state_dict(memory.state_dict())
    assert held(30 * draw(1).float().expand(2, 400, 8))[0].isfinite().all()


def test_numbers_of_objectives_and_retentions_are_checked():
    for wrong in (
        lambda: PNorm(0.5),
        lambda: Huber("round"),
        lambda: Huber(delta=0.0),
        lambda: Lq(3.0),
        lambda: Lq(1.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()


def test_no_answer_is_idle():
    x = draw(9)
    base = build()(x)[0]
    answers = [("structure", s) for s in ("matrix", "gated", "vector")] + [
        ("optimizer", o) for o in list(OPTIMIZERS)[1:]
    ]
    answers += [("objective", o) for o in OBJECTIVES if o != "squared"]
    answers += [("retention", r) for r in (*RETENTIONS, "start")] + [("gates", "channel")]
    answers += [("read", r) for r in READS[1:]] + [("window", 2), ("norm", True), ("residual", False), ("layers", 3)]
    outs = [base] + [build(**{name: value})(x)[0] for name, value in answers]
    for a, b in product(range(len(outs)), repeat=2):
        assert a >= b or (outs[a] - outs[b]).abs().max() > 1e-7, ([None, *answers][a], [None, *answers][b])


@pytest.mark.parametrize("answers", [{}, {"layers": 4}, {"structure": "gated"}, {"optimizer": "momentum", "window": 3}])
def test_the_dot_product_outgrows_no_decay(answers):
    memory = build(objective="dot", max_step=2.0, **answers).float()
    with torch.no_grad():
        y, state = memory(10 * draw(1).float().expand(2, 2000, 8))
    first = flatten(memory.initial_state(2)["net"]["weight"])
    for name, W in flatten(state["net"]["weight"]).items():
        most = torch.maximum(first[name].norm(dim=(2, 3)), torch.tensor(0.5 * W.shape[2] ** 0.5))
        assert (W.norm(dim=(2, 3)) <= 1.001 * most).all()
    assert y.isfinite().all()


def test_moneta_reads_on_where_its_sums_have_decayed():
    torch.manual_seed(0)
    memory = make("moneta", 32)
    with torch.no_grad():
        y = memory(torch.randn(1, 6000, 32))[0]
    assert y.isfinite().all()
    assert y[:, -1000:].abs().max() < 4 * y[:, :1000].abs().max()
