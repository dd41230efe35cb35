"""Any combination of the six answers: it runs, finite, and goes on from a cut, or says which answers cannot meet."""

from itertools import product

import pytest
import torch

from remanence.memory.atlas import OmegaDelta, OmegaNet
from remanence.memory.fast_weight import KEPT, OPTIMIZERS, STRUCTURES, FastWeightMemory
from remanence.ops.fast_weight import READS
from remanence.ops.objectives import OBJECTIVES
from remanence.ops.retention import RETENTIONS
from remanence.state import flatten

HELD = (*KEPT, *RETENTIONS)
SINGLE = {"lq", "lq-mirror", "softmax", "chi-squared", "hellinger", "reverse-kl"}
"""Retentions of a norm or a sum that several weights share."""
SMALL = {"dim": 2, "heads": 1, "expand": 1, "conv": 2}


def clash(structure, objective, retention, optimizer):
    """The two answers that cannot meet, or None."""
    if structure == "vector" and optimizer == "muon":
        return "'vector'", "'muon'"
    if structure == "vector" and retention in SINGLE:
        return "'vector'", f"'{retention}'"
    if structure in ("mlp", "gated") and (objective, retention) == ("dot", "none") and optimizer != "muon":
        return "'dot'", "'none'"
    return None


@pytest.mark.parametrize("retention", HELD)
@pytest.mark.parametrize("structure", STRUCTURES)
@torch.no_grad()
def test_combinations_run_and_resume_or_name_two_answers(structure, retention):
    x, ran = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0
    place = list(STRUCTURES).index(structure) + HELD.index(retention)
    for i, (objective, optimizer) in enumerate(product(OBJECTIVES, OPTIMIZERS)):
        answers = {"structure": structure, "objective": objective, "retention": retention, "optimizer": optimizer}
        if both := clash(**answers):
            with pytest.raises(ValueError, match=r"^FastWeightMemory: .*\.$") as refused:
                FastWeightMemory(**SMALL, **answers)
            assert all(answer in str(refused.value) for answer in both), (both, str(refused.value))
            continue
        if (i + place) % 3:  # every pair of answers meets, but not every six of them
            continue
        torch.manual_seed(0)
        memory = FastWeightMemory(**SMALL, **answers).double()
        for memory.chunk_size, memory.read in product((1, 2), READS):
            want, end = memory(x)
            assert want.isfinite().all(), (answers, memory.chunk_size, memory.read)
            if memory.chunk_size > 1:  # the cut lies inside a chunk
                first, state = memory(x[:, :1])
                second, state = memory(x[:, 1:], state)
                pairs = zip(
                    [torch.cat([first, second], 1), *flatten(state).values()],
                    [want, *flatten(end).values()],
                    strict=True,
                )
                assert all((a - b).abs().max() <= 1e-9 * (1 + b.abs().max()) for a, b in pairs if a.numel()), answers
            ran += 1
    assert ran > 0 or structure == "vector"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"objective": "huber"}, "objective must be 'squared', .* got 'huber'"),
        ({"retention": "softmax"}, "retention must be 'none' or 'decay', .* got 'softmax'"),
        ({"read": "before"}, "read must be 'after'"),
        ({"gates": "channel"}, "gates must be 'head'"),
    ],
)
def test_the_exact_omega_rule_says_which_answers_it_has(answers, said):
    with pytest.raises(ValueError, match=f"OmegaDelta: {said}"):
        OmegaDelta(8, heads=2, **answers)


def test_gates_of_channels_and_lifted_keys():
    with pytest.raises(ValueError, match="gates 'channel' are of the values' features, lifted keys have others"):
        OmegaNet(8, heads=2, gates="channel")
    x = torch.randn(1, 5, 8)
    for answers in ({"degree": None}, {"structure": "matrix"}):
        assert OmegaNet(8, heads=2, expand=1, gates="channel", **answers)(x)[0].isfinite().all()
