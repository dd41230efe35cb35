import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from remanence.errors import StateError, UnknownName
from remanence.evaluation.proofs.atlas import atlas
from remanence.memory.atlas import DLA, SWLA, Atlas, AtlasPlus, OmegaDelta, OmegaNet, PolynomialFeatures
from remanence.memory.deep_transformer import SWDT, DeepTransformer, Dot
from remanence.memory.titans import Titans
from remanence.state import flatten, nbytes

SMALL = {
    OmegaNet: {"window": 3, "expand": 2, "chunk_size": 4},
    Atlas: {"window": 3, "expand": 2, "chunk_size": 4},
    AtlasPlus: {"window": 3, "expand": 2, "chunk_size": 4},
    DLA: {"expand": 2, "chunk_size": 4},
    SWLA: {},
    OmegaDelta: {"window": 3},
    Dot: {"window": 2},
    SWDT: {},
    DeepTransformer: {"expand": 2, "chunk_size": 4},
}
EVERY = pytest.mark.parametrize("kind", SMALL)


def build(kind, **changes):
    torch.manual_seed(0)
    return kind(8, heads=2, **{**SMALL[kind], **changes}).double()


def draw(T, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, T, 8, generator=g, dtype=torch.float64, requires_grad=True)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@EVERY
def test_a_monotonous_loud_stream_stays_finite(kind):
    memory = build(kind).float()
    with torch.no_grad():
        y, state = memory(10 * draw(1).float().expand(2, 600, 8))
    assert y.isfinite().all()
    assert all(t.isfinite().all() for t in flatten(state).values())


@pytest.mark.parametrize("kind", [Dot, SWDT, DeepTransformer])
def test_what_keeps_every_token_grows_by_blocks_as_it_says(kind):
    memory = build(kind)
    with torch.no_grad():
        states = {n: memory(draw(n, 1))[1] for n in (1, 64, 65, 129)}
    assert [s["keys"].shape[2] for s in states.values()] == [64, 64, 128, 192]
    assert nbytes(states[1]) == nbytes(states[64]) < nbytes(states[65])
    with pytest.raises(StateError, match="a state of 64 tokens cannot be at position 70"):
        memory(draw(1, 1), {**states[64], "position": torch.tensor([70])})


def test_polynomial_features_are_their_kernel():
    q, k = (F.normalize(x, dim=-1) for x in draw(5)[:2].detach())
    s = q @ k.mT
    for degree in (1, 2, 3):
        features = PolynomialFeatures(8, degree).double()
        assert features(q).shape[-1] == features.features == math.comb(8 + degree, degree)
        close(features(q) @ features(k).mT, sum(s**i / math.factorial(i) for i in range(degree + 1)), 1e-12)
    with torch.no_grad():
        features.root[:] = torch.tensor([0.0, 1.0, 0.0, 2.0])
    close(features(q) @ features(k).mT, s + 4 * s**3 / 6, 1e-12)
    with pytest.raises(ValueError, match="width and degree must be at least 1, got 4 and 0"):
        PolynomialFeatures(4, 0)


def test_a_window_of_one_over_plain_keys_is_titans():
    memory = build(OmegaNet, window=1, degree=None, optimizer="momentum")
    titans = Titans(8, heads=2, expand=2, chunk_size=4).double()
    titans.load_state_dict(memory.state_dict())
    x = draw(13)
    close(memory(x)[0], titans(x)[0], 1e-12)


def test_the_exact_matrix_is_the_anchored_one_with_chunks_of_a_token():
    """Steps of the two are bounded otherwise, so neither is bounded here."""
    given = {"window": 3, "max_step": 0.1, "bound": None}
    exact = build(OmegaDelta, **given)
    anchored = build(OmegaNet, structure="matrix", **{**given, "chunk_size": 1})
    anchored.load_state_dict(exact.state_dict())
    x = draw(13)
    close(anchored(x)[0], exact(x)[0])
    close(flatten(anchored(x)[1]), flatten(exact(x)[1]))


def test_the_matrix_under_dot_ignores_its_chunk():
    x = draw(11)
    close(build(SWLA, chunk_size=3)(x)[0], build(SWLA, chunk_size=64)(x)[0])
    assert (build(SWLA, window=1)(x)[0] - build(SWLA)(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [OmegaNet, Atlas, OmegaDelta])
def test_the_window_matters_and_so_do_features(kind):
    x = draw(11)
    y = build(kind)(x)[0]
    for changes in ({"window": 1}, {"degree": 1}, {"degree": None}):
        assert (build(kind, **changes)(x)[0] - y).abs().max() > 1e-3


def test_deep_linear_attention_stays_bounded_where_the_free_rule_explodes():
    """Its two layers feed each other: a token of length 10, 4000 times."""
    memory = build(DLA).float()
    with torch.no_grad():
        _, state = memory(10 * draw(1).float().expand(2, 4000, 8))
    start = max(float(W.detach().norm()) for W in memory.start)
    assert max(float(W.norm()) for W in state["net"]["weight"].values()) < 10 * start


def test_recall_reads_what_is_known():
    memory, x = build(OmegaNet), draw(8)
    _, state = memory(x)
    (q,) = memory.lift(torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double())
    assert memory.recall(q, state).shape == (2, 2, 3, 4)
    assert (memory.recall(q, state) - memory.recall(q, memory.initial_state(2))).abs().max() > 1e-6


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"OmegaNet: .* must be at least 1, got .*window=0"):
        OmegaNet(8, heads=2, window=0)
    with pytest.raises(ValueError, match="a vector has no lifted keys; use FastWeightMemory"):
        OmegaNet(8, heads=2, structure="vector")
    with pytest.raises(ValueError, match="OmegaDelta: optimizer must be 'gradient' or 'momentum', got 'muon'"):
        OmegaDelta(8, heads=2, optimizer="muon")
    with pytest.raises(ValueError, match="width and degree must be at least 1, got 0 and 2"):
        OmegaNet(8, heads=2, feature_dim=0)
    with pytest.raises(UnknownName, match="did you mean 'squared'"):
        build(OmegaNet, objective="square")
    with pytest.raises(ValueError, match="Dot: window must be at least 1, got 0"):
        Dot(8, heads=2, window=0)
    with pytest.raises(ValueError, match="DeepTransformer: all sizes must be at least 1, got expand=0"):
        DeepTransformer(8, heads=2, expand=0)


def test_windowed_attention_without_division():
    """At window 1 with open gates it is softmax attention's numerator."""
    memory = build(SWDT, window=1)
    with torch.no_grad():
        memory.gates.weight.zero_()
        memory.gates.bias.fill_(100.0)
    x = draw(7)
    q, k, v, _ = memory.project(x, memory.initial_state(2))
    scores = (q @ k.mT - 4).exp().tril()  # keys and queries are 2 long, to the norm's own smallest length
    close(memory(x)[0], memory.readout(scores @ v, x), 1e-3)
    both = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    close(both, scores @ v / scores.sum(-1, keepdim=True), 1e-9)


def test_the_proof():
    system, control = atlas()
    assert system.holds
    assert not control.holds


def test_the_examples_of_the_docs_run():
    page = Path(__file__).parents[2] / "docs" / "atlas.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {"__name__": "example"})
