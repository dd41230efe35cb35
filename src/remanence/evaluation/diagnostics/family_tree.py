"""The linear recurrences as a family tree: what each was made from, and the one thing that was changed.

Cards name parents and change; what they leave open, and what a token costs, stands in `KIN`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from remanence import catalogue
from remanence.catalogue import card

TAGS = ("LTI", "selective", "attention", "convolution", "nonlinear", "hybrid", "tool", "analysis")
"""LTI: gates do not look at the input; selective: they do; nonlinear: the state enters its own gates or objective."""

COSTS = {
    "scan": ("2 N", "N"),
    "outer": ("5 K V", "K V"),
    "delta": ("9 K V", "K V"),
    "convolution": ("2 L D", "L D"),
    "expgate": ("5 K V + 4 K", "K V + K + 1"),
    "slots": ("10 M K", "2 M K"),
    "window": ("4 w K", "2 w K"),
    "loop": ("iterated", "as built"),
    "dense": ("2 N²", "N"),
    "": ("", ""),
}
"""Floating-point operations of one decoded token, and numbers of state: per feature for a scan with N states, per head
with K key and V value features, M slots, a window of w tokens, or a kernel of L tokens over D features."""


@dataclass(frozen=True)
class Kin:
    """Where a system stands in the family: its primitive (a key of `COSTS`), one of `TAGS`, parents and the change."""

    primitive: str
    tag: str
    parents: tuple[str, ...] = ()
    change: str = ""


KIN = {
    "softmax": Kin("window", "attention"),
    "sliding-window": Kin("window", "attention", ("softmax",), "only the last tokens are kept"),
    "neighborhood-attention": Kin("window", "attention"),
    "aaren": Kin("expgate", "attention"),
    "abc": Kin("slots", "selective"),
    "gsa": Kin("slots", "selective"),
    "linear-attention": Kin("outer", "LTI", ("softmax",), "a positive feature map, so that the past becomes a sum"),
    "retnet": Kin("outer", "LTI", ("linear-attention",), "one fixed decay per head, rotary phases, no normaliser"),
    "lightning-attention-tnl": Kin("outer", "LTI"),
    "lightning-attention-2": Kin("outer", "tool", ("lightning-attention-tnl",), "tiles, at a constant cost per token"),
    "gla": Kin("outer", "selective", ("retnet",), "the decay is chosen by the input, per key feature"),
    "gateloop": Kin("outer", "selective"),
    "lightnet": Kin("outer", "selective"),
    "hgrn2": Kin("outer", "selective"),
    "rwkv6": Kin("outer", "selective"),
    "jrt": Kin("outer", "LTI"),
    "gated-rnn-attention": Kin("scan", "LTI"),
    "xlstm-7b": Kin("expgate", "selective"),
    "rwkv": Kin("expgate", "LTI"),
    "deltanet": Kin("delta", "selective"),
    "gated-deltanet": Kin("delta", "selective"),
    "kimi-delta": Kin("delta", "selective"),
    "deltaproduct": Kin("delta", "selective"),
    "efla": Kin("delta", "selective"),
    "rwkv7": Kin("delta", "selective"),
    "mom": Kin("delta", "selective"),
    "lattice": Kin("loop", "nonlinear"),
    "hippo": Kin("dense", "LTI"),
    "lssl": Kin("dense", "LTI", ("hippo",), "transition and step are trained"),
    "s4d": Kin("scan", "LTI", ("lssl",), "a diagonal complex transition"),
    "s5": Kin("scan", "LTI", ("s4d",), "one state for all features instead of one for each"),
    "s7": Kin("scan", "selective", ("s5",), "the transition is chosen by the input, and stays bounded"),
    "stablessm": Kin("scan", "LTI", ("s4d",), "weights become decays so that slow ones can be learnt"),
    "lru": Kin("scan", "LTI", ("s5",), "no continuous time: a ring of eigenvalues, and a normalised input"),
    "mamba": Kin("scan", "selective", ("s4d",), "step, input and output maps are chosen by the input"),
    "mamba2": Kin("outer", "selective"),
    "longhorn": Kin("scan", "selective", ("mamba", "deltanet"), "the closed-form minimiser of an online objective"),
    "hgrn": Kin("scan", "selective", ("lru",), "forget gates with lower bounds that rise with depth"),
    "griffin": Kin("scan", "hybrid", ("lru", "sliding-window"), "a decay raised to a gate, beside local attention"),
    "recurrentgemma": Kin("scan", "hybrid"),
    "min-lstm-gru": Kin("scan", "selective", ("hgrn",), "GRU and LSTM without what they read of their state"),
    "fixed-point-rnn": Kin("loop", "selective", ("mamba",), "a dense transition, as the fixed point of a diagonal one"),
    "warp": Kin("dense", "LTI", ("lssl",), "the state is the weights of a small network"),
    "vssm": Kin("scan", "LTI", ("s5",), "latent variables between two of them"),
    "smr": Kin("", "tool", ("s5",), "the input is multiplied by a short convolution of itself"),
    "ckconv": Kin("convolution", "convolution", ("lssl",), "the kernel is a small network of relative time"),
    "tcnca": Kin("convolution", "hybrid", ("ckconv", "sliding-window"), "a dilated convolution and chunked attention"),
    "liger": Kin("outer", "hybrid"),
    "lizard": Kin("outer", "hybrid"),
    "statex": Kin("", "tool", ("gla", "mamba2"), "the state is widened after training"),
    "simba": Kin("", "tool", ("mamba",), "upper layers read fewer tokens"),
    "longmamba": Kin("", "tool", ("mamba", "mamba2"), "tokens of small steps are skipped in channels that remember"),
    "length-generalization": Kin("", "tool", ("mamba2",), "training starts from states that long texts lead to"),
    "oprm": Kin("", "tool", ("mamba",), "a long text is read in pieces, and the surest answer kept"),
    "resona": Kin("", "hybrid", ("mamba", "softmax"), "passages of the context are found again and attended to"),
    "quamba": Kin("", "tool", ("mamba",), "weights and states of eight bits"),
    "lasp2": Kin("", "tool", ("lightning-attention-2",), "the sequence is split over machines that exchange states"),
    "hybrid-analysis": Kin("", "analysis", ("gated-deltanet", "hgrn2", "softmax"), "both in one stack, at a ratio"),
    "selectivbench": Kin("", "analysis", ("mamba", "gated-deltanet"), "grammars with gaps"),
    "linear-rnn-universality": Kin("", "analysis", ("lru",), "what a state still knows"),
    "rnn-in-context-retrieval": Kin("", "analysis", ("mamba", "softmax"), "what a state cannot know"),
    "selective-ssm-signature": Kin("dense", "analysis", ("mamba",), "the transition follows the path's increments"),
    "ssm-generalization": Kin("", "analysis", ("mamba",), "norms that bound the error"),
}
"""The family by heart; parents and changes only where no card tells them."""


@dataclass(frozen=True)
class Member:
    """A system of the tree, as `family` yields them."""

    id: str
    parents: tuple[str, ...]
    change: str
    tag: str
    cost: str
    state: str


def family() -> dict[str, Member]:
    """The members by id: what cards say of parents and change goes before the table."""
    told = {c.system.id: c for c in catalogue.cards().values() if c.parents and c.system.family == "linear"}
    members = {}
    for id in KIN | told:
        kin, own = KIN.get(id, Kin("", "tool")), told.get(id)
        parents, change = (own.parents, own.change) if own else (kin.parents, kin.change)
        members[id] = Member(id, parents, change, kin.tag, *COSTS[kin.primitive])
    return members


def walk(members: dict[str, Member]) -> Iterator[tuple[int, Member]]:
    """(depth, member), first parents before their children; each member once, under the first of its parents.

    Raises: `ValueError` when a member is its own ancestor, or has a parent that is no member.
    """
    seen: set[str] = set()

    def below(id: str, depth: int) -> Iterator[tuple[int, Member]]:
        seen.add(id)
        yield depth, members[id]
        for child in members.values():
            if child.parents[:1] == (id,):
                yield from below(child.id, depth + 1)

    for member in members.values():
        if strangers := [p for p in member.parents if p not in members]:
            raise ValueError(f"The family has no {strangers[0]!r}, which {member.id!r} names as its parent.")
        if not member.parents:
            yield from below(member.id, 0)
    if lost := members.keys() - seen:
        raise ValueError(f"In the family {', '.join(sorted(lost))} descend from themselves.")


@card(
    "survey-s4",
    kind="diagnostic",
    says="The recurrences as a family tree: parents, the one change, and the cost of a token.",
    source="A Survey on Structured State Space Sequence (S4) Models (2025)",
)
def tree() -> list[str]:
    """The family as lines of text, children under their first parent: what `remanence systems --tree` shows.

    Each says the id, its tag, the one change, other parents, and the operations and numbers of state per token.
    """
    lines = []
    for depth, m in walk(family()):
        cost = f"; {m.cost} flops, {m.state} numbers" if m.cost else ""
        others = f" (and {', '.join(m.parents[1:])})" if len(m.parents) > 1 else ""
        lines.append(f"{'  ' * depth}{m.id} [{m.tag}{cost}]" + (f": {m.change}{others}" if m.change else ""))
    return lines
