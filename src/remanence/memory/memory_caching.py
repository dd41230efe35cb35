"""Memory caching: what a memory held at the end of every segment is kept, and read beside the present one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import catalogue
from remanence.catalogue import card
from remanence.errors import StateError, expect, unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import wide, zeros
from remanence.ops import steps
from remanence.ops.inner_network import fast_weight_read
from remanence.ops.phases import piece_sizes
from remanence.ops.taps import Call, tap
from remanence.ops.ttt import ttt_read, ttt_weights, turned
from remanence.state import Form, State, check_state, concat, fits, form, select, tree_map

VARIANTS = ("gated", "residual", "soup", "sparse", "average")
BLOCK = 4
"""Segments by which the state grows, so that rows of different lengths can lie side by side."""

Arguments = Mapping[str, Any]


class Reader(NamedTuple):
    """How a recurrence is read at another state: which tensors it reads, and what its queries find in them.

    `linear`: a read of mixed states is the mix of their reads.
    """

    weights: Callable[[Arguments, State], State]
    read: Callable[[Arguments, State], Tensor]
    linear: bool


def _solve(a: Arguments, s: State) -> Tensor:
    H = s["H"] + torch.diag_embed(a["ridge"].to(s["H"].dtype))
    return torch.linalg.solve(H, a["query"].to(H.dtype).mT).mT @ s["G"]


_MATRIX = Reader(lambda a, s: {"S": s["S"]}, lambda a, s: a["query"].to(s["S"].dtype) @ s["S"], True)
READERS = {
    "linear_attention": _MATRIX,
    "gated_delta_rule": _MATRIX,
    "dplr": _MATRIX,
    "least_squares": Reader(lambda a, s: s, _solve, False),
    "fast_weight": Reader(
        lambda a, s: s["weight"],
        lambda a, s: fast_weight_read(wide(a["query"]), list(s.values()), residual=a["residual"]),
        False,
    ),
    "ttt": Reader(
        lambda a, s: dict(zip(s["anchor"], ttt_weights(s, a["average"]), strict=True)),
        lambda a, s: ttt_read(
            turned(wide(a["query"]), a["turn"], a["state"]["pos"]), list(s.values()), wide(a["scale"]), wide(a["shift"])
        ),
        False,
    ),
}
"""The recurrences whose queries can be put to a kept state."""


@card(
    "memory-caching",
    kind="memory",
    says="Any memory that keeps its state at the end of every segment, and reads a gated mix of them all.",
    source="arXiv:2602.24281",
    small={"dim": 8, "memory": "gated-deltanet", "arguments": {"heads": 2}, "segment": 4},
    exempt={"constant state": "it keeps one state for every segment read, in blocks of four, unless told to drop some"},
)
class MemoryCaching(Memory):
    r"""$y_t = \sum_{i ≤ s} γ_{ti} f(M^{(i)}, q_t)$: the ends of past segments, and the live memory of this one.

    Kept with each state is the mean $μ_i$ of its segment's inputs; $γ = \mathrm{softmax}_i ⟨W_u x_t, μ_i⟩$, where the
    live segment has the mean of what was read of it so far.

    Where the memory's recurrence is one of `READERS`, its own queries are put to the kept states, and what they read
    is mixed before the memory's readout, as in the paper; only what is read is kept, no momentum and no convolution
    tails. Any other memory is asked by its next output, had it gone on from the kept state with this very token; its
    whole state is kept.

    Args:
        dim: features of input and output.
        memory: the catalogue id of a memory, or one of width `dim`.
        arguments: of the memory, where it is named.
        variant: "gated" as above (GRM); "residual": the plain sum; "sparse": gates over the live memory and the `top`
            highest scored only (SSC); "soup": the states are mixed, then read once (equal to "gated" for matrices; for
            networks it goes token by token); "average": all count the same, for memories trained without it.
        segment: tokens between states that are kept, counted from the stream's first.
        independent: start every segment afresh instead of going on from the last one's end.
        top: kept states that "sparse" reads.
        max_segments: keep the latest only, which makes the state constant. The paper keeps all.

    Shapes: x and y [batch, time, dim]; with N segments read and room = 4·⌈N/4⌉ (or `max_segments`), state {"memory":
        that of the memory, "kept": {"0": what the first recurrence reads [batch, room, ...], ...}, latest last,
        "means": [batch, room, dim], "sum": [batch, dim], of the open segment, "pos": int64 [batch]}.
    Raises: `UnknownName` for a memory or variant that there is not; `ValueError` on sizes below 1, a memory of another
        width, or a soup of states that are not read by query; `ShapeError`, `StateError` from `forward`.
    Source: Memory Caching: RNNs with Growing Memory (2026), arXiv:2602.24281.
    """

    def __init__(
        self,
        dim: int,
        *,
        memory: str | Memory = "linear-attention",
        arguments: Mapping[str, Any] | None = None,
        variant: str = "gated",
        segment: int = 256,
        independent: bool = False,
        top: int = 4,
        max_segments: int | None = None,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise unknown("variant of memory caching", variant, VARIANTS)
        if min(segment, top, 1 if max_segments is None else max_segments) < 1:
            given = f"segment={segment}, top={top}, max_segments={max_segments}"
            raise ValueError(f"MemoryCaching: segment, top and max_segments must be at least 1, got {given}.")
        self.memory: Memory = (
            catalogue.find(memory, "memory").make(dim, **(arguments or {})) if isinstance(memory, str) else memory
        )
        if self.memory.dim != dim:
            raise ValueError(f"MemoryCaching: the memory must have width {dim}, got {self.memory.dim}.")
        self.dim, self.variant, self.segment = dim, variant, segment
        self.independent, self.top, self.max_segments = independent, top, max_segments
        self.score = Linear(dim, dim, bias=False)
        self.kept_form, self.by_query = self._probe()
        if variant == "soup" and not self.by_query:
            raise ValueError(
                f"MemoryCaching: a soup mixes what queries read, but {type(self.memory).__name__} has no recurrence "
                f"among {', '.join(READERS)}; take variant='gated'."
            )

    @torch.no_grad()
    def _probe(self) -> tuple[Form, bool]:
        """What is kept of a segment, seen by reading one token; and whether it is read by query."""
        found: State = {}

        def handler(call: Call) -> Any:
            if call.op not in READERS:
                return call.run()
            y, after = call.run()
            found[str(len(found))] = READERS[call.op].weights(call.arguments, after)
            return y, after

        start = self.memory.initial_state(1)
        with tap(handler):
            after = self.memory(self.score.weight.new_zeros(1, 1, self.dim), start)[1]
        return form(found or {"0": after}), bool(found)

    def initial_state(self, batch: int) -> State:
        return {"memory": self.memory.initial_state(batch), **self._kept(batch, self.max_segments or 0)}

    def _kept(self, batch: int, room: int) -> State:
        means = zeros(self.score.weight, batch, room, self.dim)

        def empty(of: Form) -> State:
            kinds = {"floating": means.dtype, "integer": torch.int64, "bool": torch.bool, "complex": torch.complex128}
            return {
                name: empty(x) if isinstance(x, dict) else means.new_zeros(batch, room, *x[0], dtype=kinds[x[1]])
                for name, x in of.items()
            }

        pos = torch.zeros(batch, dtype=torch.int64, device=means.device)
        return {"kept": empty(self.kept_form), "means": means, "sum": zeros(means, batch, self.dim), "pos": pos}

    def begin(self, x: Tensor, state: State | None) -> State:
        expect("MemoryCaching", "x", x, "batch time dim", dim=self.dim, hint="One token per row? Pass x[:, None].")
        B = x.shape[0]
        if state is None:
            return self.initial_state(B)
        means = state.get("means")
        room = means.shape[1] if isinstance(means, Tensor) and means.ndim == 3 else 0
        inner = state.get("memory")
        if not isinstance(inner, dict):
            raise StateError("MemoryCaching: this state belongs to another layer: it has no 'memory'.")
        self.memory.begin(x[:, :0], inner)
        kept = {n: t for n, t in state.items() if n != "memory"}
        if self._form is None or self._form["means"][0][0] != room:
            self._form = form(self._kept(1, room))
        if not fits(kept, self._form, B):
            check_state("MemoryCaching", kept, self._kept(B, room))
        if int(state["pos"].max()) // self.segment > room and self.max_segments is None:
            raise StateError(f"MemoryCaching: a state of {room} segments cannot be at token {int(state['pos'].max())}.")
        return state

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if not x.shape[1]:
            return self.memory(x, state["memory"])[0], state
        if x.shape[1] == 1 and steps.worth(x, state["sum"]) and int(state["pos"].max()) + 1 < self.segment:
            # in the first segment there is nothing else to read, and the memory may take a step of its own
            y, inner = self.memory(x, state["memory"])
            return y, {**state, "memory": inner, "sum": state["sum"] + x[:, 0], "pos": state["pos"] + 1}
        phases = (state["pos"] % self.segment).tolist()
        if len(set(phases)) == 1:
            return self._run(x, state, phases[0])
        groups = [[i for i, p in enumerate(phases) if p == phase] for phase in sorted(set(phases))]
        parts = [self._run(x[rows], select(state, rows), phases[rows[0]]) for rows in groups]
        order = torch.tensor([i for rows in groups for i in rows], device=x.device).argsort()
        states = concat(self.level([after for _, after in parts]))
        return torch.cat([y for y, _ in parts])[order], select(states, order)

    def _run(self, x: Tensor, state: State, phase: int) -> tuple[Tensor, State]:
        """Rows that stand at one phase of their segments, a segment at a time."""
        out = []
        for piece in x.split(piece_sizes(x.shape[1], phase, self.segment), 1):
            if self.independent and not phase:
                state = {**state, "memory": self.memory.initial_state(len(x))}
            total = state["sum"][:, None] + wide(piece).cumsum(1)
            mean = total / (phase + torch.arange(1, piece.shape[1] + 1, device=x.device))[:, None]
            gates = self._gates(piece, mean, state["means"], state["pos"] // self.segment)
            y, inner, left = self._read(piece, state["memory"], state["kept"], gates)
            out.append(y)
            phase = (phase + piece.shape[1]) % self.segment
            state = {**state, "memory": inner, "sum": total[:, -1], "pos": state["pos"] + piece.shape[1]}
            state = state if phase else self._keep(state, left, mean[:, -1])
        return torch.cat(out, 1), state

    def _gates(self, x: Tensor, mean: Tensor, means: Tensor, count: Tensor) -> Tensor:
        """γ [batch, time, room + 1], the live memory last; exactly zero for what is not there or not chosen."""
        u = wide(self.score(x))
        score = torch.cat([u @ means.mT, (u * mean).sum(-1, keepdim=True)], -1)
        slot = torch.arange(means.shape[1] + 1, device=x.device)
        there = (slot >= (means.shape[1] - count)[:, None])[:, None].expand_as(score)
        if self.variant == "residual":
            return there.to(score.dtype)
        if self.variant == "average":
            score = torch.zeros_like(score)
        score = score.masked_fill(~there, -torch.inf)
        if self.variant == "sparse" and self.top < means.shape[1]:
            chosen = score[..., :-1].topk(self.top, -1).indices
            kept = torch.zeros_like(there[..., :-1]).scatter(-1, chosen, True)
            score = score.masked_fill(~F.pad(kept, (0, 1), value=True), -torch.inf)
        return score.softmax(-1)

    def _read(self, x: Tensor, inner: State, kept: State, gates: Tensor) -> tuple[Tensor, State, State]:
        """What the live memory and the kept ones answer; the live one's state, and what of it would be kept."""
        slots = [i for i in range(gates.shape[-1] - 1) if bool(gates[..., i].any())]
        if not self.by_query:
            y, after = self.memory(x, inner)
            y = gates[..., -1:].to(y.dtype) * y
            for i in slots:
                each = tree_map(lambda t, i=i: t[:, i].repeat_interleave(x.shape[1], 0), kept["0"])
                said = self.memory(x.flatten(0, 1)[:, None], each)[0]
                y = y + gates[..., i, None].to(y.dtype) * said.view_as(y)
            return y, after, {"0": after}
        left: State = {}

        def handler(call: Call) -> Any:
            if call.op not in READERS:
                return call.run()
            reader, name, query = READERS[call.op], str(len(left)), call.arguments["query"]
            g = gates.repeat_interleave(query.shape[2] // gates.shape[1], 1)[:, None]
            ends = {i: tree_map(lambda t, i=i: t[:, i], kept[name]) for i in slots}
            if self.variant == "soup" and not reader.linear:
                y, after = _soup(call, reader, g, ends)
            else:
                y, after = call.run()
                dtype, y = y.dtype, g[..., -1:] * y
                y = sum((g[..., i, None] * reader.read(call.arguments, end) for i, end in ends.items()), y).to(dtype)
            left[name] = reader.weights(call.arguments, after)
            return y, after

        with tap(handler):
            y, after = self.memory(x, inner)
        return y, after, left

    def _keep(self, state: State, left: State, mean: Tensor) -> State:
        """The state after a segment has ended: one more is kept, in a place of its own."""
        most = int(state["pos"].max()) // self.segment
        room = self.max_segments or max(state["means"].shape[1], -(-most // BLOCK) * BLOCK)
        kept = tree_map(lambda old, new: _last(torch.cat([old, new[:, None]], 1), room), state["kept"], left)
        means = _last(torch.cat([state["means"], mean[:, None]], 1), room)
        return {**state, "kept": kept, "means": means, "sum": torch.zeros_like(state["sum"])}

    def level(self, states: Sequence[State]) -> Sequence[State]:
        most = max(s["means"].shape[1] for s in states)
        grown = [{**s, "kept": tree_map(lambda t: _last(t, most), s["kept"]), "means": _last(s["means"], most)}
                 for s in states]  # fmt: skip
        inner = self.memory.level([s["memory"] for s in states])
        return [{**s, "memory": i} for s, i in zip(grown, inner, strict=True)]


def _last(x: Tensor, room: int) -> Tensor:
    """The last `room` slots of [B, slots, ...], with zeros before them where there are fewer."""
    missing = room - x.shape[1]
    return x[:, -missing:] if missing <= 0 else torch.cat([x.new_zeros(len(x), missing, *x.shape[2:]), x], 1)


def _soup(call: Call, reader: Reader, gates: Tensor, ends: Mapping[int, State]) -> tuple[Tensor, State]:
    """Weights mixed, then read: a network's own weights exist one token at a time only."""
    state, out = call.arguments["state"], []
    of_tokens = (n for n, x in call.arguments.items() if isinstance(x, Tensor) and x.ndim > 2 and n != "turn")
    every = {n: call.arguments[n] for n in of_tokens}  # [B, H, T, ...]
    for t in range(call.arguments["query"].shape[2]):
        now = {**call.arguments, **{n: x[:, :, t : t + 1] for n, x in every.items()}, "state": state}
        y, state = call.run(**now)
        g = gates[:, 0, t]
        mixed = tree_map(lambda W, g=g: _rows(g[:, -1], W), reader.weights(now, state))
        for i, end in ends.items():
            mixed = tree_map(lambda m, W, i=i, g=g: m + _rows(g[:, i], W), mixed, end)
        out.append(reader.read(now, mixed).to(y.dtype))
    return torch.cat(out, 2), state


def _rows(scale: Tensor, x: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (x.ndim - 1)) * x
