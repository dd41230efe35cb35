"""The laws that every memory obeys, checked on every registered memory, and on broken ones that they must catch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from remanence import catalogue
from remanence.errors import StateError
from remanence.memory.base import Memory, ragged
from remanence.memory.pieces import in_pieces
from remanence.state import State, concat, flatten, fork, load, nbytes, save, select, tree_map

CARDS = catalogue.cards("memory")
FAR = 5000
SLOW = """atlas atlas++ deep-transformer dla dot fast-weight hippo hope memory-caching omega-delta omeganet
    self-modifying-titans swdt test-time-regression titans titans-mac titans-mag titans-mal tnt ttt ttt-mlp"""
SLOW_FAR = 128
"""Tokens that are far for memories of which a token costs up to milliseconds."""
CHAOTIC = dict.fromkeys(["memora", "moneta", "yaad"], "shaken, its rule amplifies rounding exponentially in time")
CHAOTIC["warp"] = "shaken, its transition is free to grow, exponentially in time"
ONLY_SIGNS = {"ckconv": ("net.0.weight",), "ckconv-block": ("convs.0.net.0.weight", "convs.1.net.0.weight")}
"""Normalised weights of one input: nothing but their sign counts, which has no slope."""
LENGTHS = st.one_of(st.integers(0, 12), st.sampled_from([63, 64, 65, 70]))


def small(id: str, **changes: object) -> Memory:
    """A small member in float64, moved away from its initialisation so that every gate matters."""
    torch.manual_seed(7)
    return shaken(CARDS[id].make(**{**CARDS[id].small, **changes}))


def new(id: str) -> Memory:
    """A small member as it starts."""
    torch.manual_seed(7)
    return CARDS[id].make(**CARDS[id].small)


def shaken(memory: Memory) -> Memory:
    memory.double()
    source = torch.Generator().manual_seed(11)
    for p in memory.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=source, dtype=torch.float64)
    return memory


def tokens(memory: Memory, batch: int, time: int, seed: int = 0) -> Tensor:
    """Random input [batch, time, dim] in the precision of the memory."""
    like = next(memory.parameters())
    source = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, memory.dim, generator=source, dtype=torch.float64).to(like)


def same(got: Tensor | State, want: Tensor | State, tolerance: float = 1e-9) -> None:
    """Equal values, shapes, names and types; tolerances are absolute and relative to the largest entry."""
    got, want = (flatten(x) if isinstance(x, dict) else {"": x} for x in (got, want))
    assert got.keys() == want.keys()
    for name, w in want.items():
        size = float(w.detach().abs().max()) if w.numel() and w.is_floating_point() else 0.0
        torch.testing.assert_close(
            got[name], w, rtol=0, atol=tolerance * (1 + size), msg=lambda m, name=name: f"{name}: {m}"
        )


def gradients(memory: Memory, x: Tensor, y: Tensor, state: State, before: Tensor | None = None) -> State:
    """Of a random function of the outputs and the final state, for the input, every parameter, and an input before."""
    source = torch.Generator().manual_seed(3)
    ends = {"y": y, **{p: t for p, t in flatten(state).items() if t.is_floating_point()}}
    loss = sum((t * torch.randn(t.shape, generator=source, dtype=torch.float64).to(t)).sum() for t in ends.values())
    leaves = {"x": x, **dict(memory.named_parameters())} | ({} if before is None else {"before": before})
    if not loss.requires_grad:  # nothing was read
        return {}
    found = torch.autograd.grad(
        loss, list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return {name.replace(".", "/"): g for name, g in zip(leaves, found, strict=True)}


# The laws. Each is a function of any memory, and raises AssertionError where it is broken.


def obeys_resumption(memory: Memory, time: int, cuts: list[int], tolerance: float = 1e-9) -> None:
    start = memory(tokens(memory, 2, 3, seed=5))[1]
    for begin in (None, tree_map(Tensor.detach, start)):
        resumes(memory, tokens(memory, 2, time), cuts, begin, tolerance)


def resumes(memory: Memory, x: Tensor, cuts: list[int], begin: State | None, tolerance: float) -> None:
    x.requires_grad_()
    y, end = memory(x, begin)
    state, pieces = begin, []
    for piece in x.tensor_split(sorted(cuts), dim=1):
        out, state = memory(piece, state)
        pieces.append(out)
    joined = torch.cat(pieces, dim=1)
    same(joined, y, tolerance)
    same(state, end, tolerance)
    same(gradients(memory, x, joined, state), gradients(memory, x, y, end), tolerance)


def reads_in_pieces(memory: Memory, time: int, piece: int) -> None:
    first, x = tokens(memory, 2, 3, seed=5).requires_grad_(), tokens(memory, 2, time).requires_grad_()
    start = memory(first)[1]
    for begin in (None, start):
        want, want_end = memory(x, begin)
        slopes = gradients(memory, x, want, want_end, first)
        for keep in ("states", "projections"):
            y, end = in_pieces(memory, x, begin, piece=piece, keep=keep)
            same(y, want)
            same(end, want_end)
            same(gradients(memory, x, y, end, first), slopes)


def has_constant_state(memory: Memory) -> None:
    sizes = {n: nbytes(memory(tokens(memory, 1, n))[1]) for n in (0, 1, 7, 100)}
    assert set(sizes.values()) == {nbytes(memory.initial_state(1))}, sizes


def survives_a_file(memory: Memory, path: Path) -> None:
    elsewhere = copy.deepcopy(memory)  # nothing but parameters and the file may carry over
    x = tokens(memory, 2, 9)
    _, state = memory(x[:, :5])
    save(state, path)
    back = load(path)
    same(back, tree_map(Tensor.detach, state), tolerance=0)
    y, after = memory(x[:, 5:], state)
    y_back, after_back = elsewhere(x[:, 5:], back)
    same(y_back, y, tolerance=0)
    same(after_back, after, tolerance=0)


def leaves_its_state_alone(memory: Memory) -> None:
    x = tokens(memory, 2, 9)
    with torch.no_grad():
        for state in (memory.initial_state(2), memory(x[:, :5])[1]):
            before = tree_map(torch.clone, state)
            want, after = memory(x, state)
            assert all(torch.equal(t, flatten(before)[p]) for p, t in flatten(state).items()), "the state was altered"
            for branch in (fork(state), fork(after)):
                tree_map(lambda t: t.zero_(), branch)
            assert all(torch.equal(t, flatten(before)[p]) for p, t in flatten(state).items()), "a fork is not one"
            same(memory(x, state)[0], want, tolerance=0)


def keeps_rows_apart(memory: Memory) -> None:
    x, more = tokens(memory, 3, 9), tokens(memory, 3, 6, seed=1)
    _, state = memory(x)
    y, end = memory(more, state)
    rows = [memory(more[i : i + 1], select(state, i)) for i in range(3)]
    same(torch.cat([out for out, _ in rows]), y)
    same(concat(after for _, after in rows), end)
    lengths = [4, 0, 6]
    uneven, after = ragged(memory, more, lengths, state)
    alone = [memory(more[i : i + 1, :n], select(state, i)) for i, n in enumerate(lengths)]
    same(after, concat(s for _, s in alone))
    for i, n in enumerate(lengths):
        same(uneven[i, :n], alone[i][0][0])
        assert not uneven[i, n:].any()


def refuses(memory: Memory, foreign: State) -> None:
    try:
        memory(tokens(memory, 2, 3), foreign)
    except StateError:
        return
    except Exception as error:
        raise AssertionError(f"refused, but not in words: {error!r}") from error
    raise AssertionError("a foreign state was taken")


def uses_its_parameters(memory: Memory, but: tuple[str, ...] = ()) -> None:
    y, _ = memory(tokens(memory, 2, 40))
    y.square().sum().backward()
    unused = {n for n, p in memory.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused <= set(but), unused


def stays_finite(memory: Memory, time: int) -> None:
    """However loud the input, in float32."""
    x = 40 * tokens(memory.float(), 1, time)
    y, state = memory(x.requires_grad_())
    y.sum().backward()
    numbers = {"y": y, "x": x.grad, **flatten(state), **{n: p.grad for n, p in memory.named_parameters()}}
    assert [n for n, t in numbers.items() if t is not None and not t.isfinite().all()] == []


def follows_in_bfloat16(memory: Memory, tolerance: float = 0.05) -> None:
    x = tokens(memory.float(), 2, 60)
    want, _ = memory(x)
    got, _ = memory.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).square().mean() < tolerance**2 * (1 + want.square().mean())


every_memory = pytest.mark.parametrize("id", [*CARDS])


def unless_exempt(id: str, law: str) -> None:
    if law in CARDS[id].exempt:
        pytest.skip(CARDS[id].exempt[law])


@every_memory
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(time=LENGTHS, data=st.data())
def test_resumption(id: str, time: int, data: st.DataObject) -> None:
    unless_exempt(id, "resumption")
    cuts = data.draw(st.lists(st.integers(0, time), min_size=1, max_size=3))
    obeys_resumption(small(id), time, cuts)


@every_memory
def test_resumption_token_by_token_in_both_precisions(id: str) -> None:
    unless_exempt(id, "resumption")
    obeys_resumption(small(id), 11, [*range(12)])
    obeys_resumption(small(id).float(), 11, [*range(12)], tolerance=1e-4)


@every_memory
@pytest.mark.parametrize("tolerance", [1e-9, 1e-4])
def test_resumption_far_along(id: str, tolerance: float) -> None:
    unless_exempt(id, "resumption")
    if id in CHAOTIC:
        pytest.skip(CHAOTIC[id])
    memory = small(id) if tolerance == 1e-9 else small(id).float()
    time = SLOW_FAR if id in SLOW.split() else FAR
    cut = Random(f"{id} {tolerance}").randint(0, time)
    resumes(memory, tokens(memory, 1, time), [cut], None, tolerance)


@every_memory
def test_reading_in_pieces(id: str) -> None:
    unless_exempt(id, "resumption")
    reads_in_pieces(small(id), 11, 4)


@every_memory
def test_constant_state_size(id: str) -> None:
    unless_exempt(id, "constant state")
    has_constant_state(small(id))


@every_memory
def test_state_survives_a_file(id: str, tmp_path: Path) -> None:
    survives_a_file(small(id), tmp_path / "state.safetensors")


@every_memory
def test_the_given_state_is_left_alone(id: str) -> None:
    leaves_its_state_alone(small(id))


@every_memory
def test_rows_are_independent(id: str) -> None:
    keeps_rows_apart(small(id))


@every_memory
def test_foreign_states_are_refused(id: str) -> None:
    memory = small(id)
    refuses(memory, memory.initial_state(3))
    refuses(memory, small(id, dim=2 * memory.dim).initial_state(2))
    refuses(memory, {"foreign": torch.zeros(2, 1)})
    form = {p: t.shape for p, t in flatten(memory.initial_state(2)).items()}
    for other in CARDS:
        state = empty(other)
        if {p: t.shape for p, t in flatten(state).items()} != form:
            refuses(memory, state)


@cache
def empty(id: str) -> State:
    return small(id).initial_state(2)


@every_memory
def test_recurrent_tensors_are_wide(id: str) -> None:
    memory = small(id).bfloat16()
    y, after = memory(tokens(memory, 1, 3))
    assert y.dtype == torch.bfloat16
    for state in (memory.initial_state(1), after):
        assert all(t.element_size() >= 4 for t in flatten(state).values() if t.is_floating_point())


@every_memory
def test_every_parameter_is_used(id: str) -> None:
    uses_its_parameters(small(id), ONLY_SIGNS.get(id, ()))


@every_memory
def test_loud_inputs_stay_finite(id: str) -> None:
    stays_finite(new(id), 60 if id in SLOW.split() else 300)


@every_memory
def test_bfloat16_follows_float32(id: str) -> None:
    follows_in_bfloat16(new(id))


# Broken memories: each breaks one law, and the same functions must say so.


class Sum(Memory):
    """An obedient leaky sum, which the broken ones below change in one place."""

    def __init__(self, dim: int = 4):
        super().__init__()
        self.dim = dim
        self.map = nn.Linear(dim, dim)

    def initial_state(self, batch: int) -> State:
        return {"h": self.map.weight.new_zeros(batch, self.dim)}

    def step(self, h: Tensor, x: Tensor) -> Tensor:
        return 0.5 * h + x

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        h, y = state["h"], []
        for token in self.map(x).unbind(1):
            h = self.step(h, token)
            y.append(h)
        return (torch.stack(y, 1) if y else x), {**state, "h": h}


class DropsState(Sum):
    def forward(self, x, state=None):
        return super().forward(x, None)


class ForgetsGradients(Sum):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return y, tree_map(Tensor.detach, state)


class LosesEmptyPieces(Sum):
    def forward(self, x, state=None):
        y, after = super().forward(x, state)
        return y, after if x.shape[1] else self.initial_state(x.shape[0])


class Grows(Sum):
    def forward(self, x, state=None):
        y, after = super().forward(x, None)
        return y, {**after, "everything": x}


class AltersItsState(Sum):
    def forward(self, x, state=None):
        y, after = super().forward(x, state)
        if state is not None:
            state["h"].copy_(after["h"])
        return y, after


class SharesItsState(Sum):
    """Its second answer depends on its first: a tensor outside the state is carried along."""

    def __init__(self, dim: int = 4):
        super().__init__(dim)
        self.aside = torch.zeros(())

    def forward(self, x, state=None):
        y, after = super().forward(x, state)
        y = y + self.aside
        self.aside = y.detach().sum()
        return y, after


class NeglectsAParameter(Sum):
    def __init__(self, dim: int = 4):
        super().__init__(dim)
        self.idle = nn.Parameter(torch.ones(dim))


class Overflows(Sum):
    def step(self, h, x):
        return 0.5 * h + x.exp().exp()


class RoundsItsState(Sum):
    def step(self, h, x):
        h = super().step(h, x)
        return h.round() if x.dtype == torch.bfloat16 else h


class MixesRows(Sum):
    def step(self, h, x):
        return 0.5 * h + x + 0.1 * h.mean(0)


class TakesAnyState(Sum):
    def begin(self, x, state):
        return {"h": torch.zeros(x.shape[0], self.dim, dtype=x.dtype)}


def laws(path: Path) -> dict[str, Callable[[Memory], None]]:
    return {
        "resumption": lambda m: obeys_resumption(m, 6, [2, 2, 4]),
        "constant state": has_constant_state,
        "file": lambda m: survives_a_file(m, path / "state.safetensors"),
        "left alone": leaves_its_state_alone,
        "rows": keeps_rows_apart,
        "foreign": lambda m: refuses(m, m.initial_state(3)),
        "parameters": uses_its_parameters,
        "loud": lambda m: stays_finite(m, 20),
        "bfloat16": follows_in_bfloat16,
    }


def test_an_obedient_memory_passes_every_law(tmp_path: Path) -> None:
    for law in laws(tmp_path).values():
        law(shaken(Sum()))


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (DropsState, "resumption"),
        (ForgetsGradients, "resumption"),
        (LosesEmptyPieces, "resumption"),
        (Grows, "constant state"),
        (SharesItsState, "file"),
        (AltersItsState, "left alone"),
        (SharesItsState, "left alone"),
        (MixesRows, "rows"),
        (TakesAnyState, "foreign"),
        (NeglectsAParameter, "parameters"),
        (Overflows, "loud"),
        (RoundsItsState, "bfloat16"),
    ],
)
def test_each_law_catches_a_memory_that_breaks_it(broken: type[Memory], law: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        laws(tmp_path)[law](shaken(broken()))
