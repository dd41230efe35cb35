"""State memory replay: a multiplicative short convolution in front of any memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remanence import catalogue
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.parts import ShortConv
from remanence.state import State


@card(
    "smr",
    kind="memory",
    says="A wrapper that corrects each input by a learned convolution of the last ones, before any memory reads it.",
    source="arXiv:2405.17534",
    small={"dim": 6, "inner": "griffin", "arguments": {"heads": 2}},
)
class SMR(Memory):
    r"""The inner memory reads $u_t ⊙ (\sum_{j<κ} w_j ⊙ u_{t-j} + c)$ in place of $u_t$.

    With w = 0 and c = 1, the start, it is the inner memory to the bit. That several past samples scale the present one
    is the paper's; the kernel's size, the start and the absence of a squashing are choices made here.

    Args:
        dim: features of input and output.
        inner: a memory of width `dim`, or the name of one (then built with `arguments`).
        width: κ, the tokens that correct an input.
        squash: pass the correction through a sigmoid (scaled to start at 1).

    Shapes: x and y [batch, time, dim]; state {"conv": {"tail": [batch, width - 1, dim]}, "inner": ...}.
    Raises: `ValueError` for a memory of another width or `width` < 1; `UnknownName`; `ShapeError`, `StateError` from
        `forward`.
    Source: SMR (2024), arXiv:2405.17534.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: Memory | str = "lssl",
        width: int = 4,
        squash: bool = False,
        arguments: dict[str, object] | None = None,
    ):
        super().__init__()
        self.dim, self.squash = dim, squash
        self.conv = ShortConv(dim, width)
        nn.init.zeros_(self.conv.weight)
        self.conv.bias = nn.Parameter(torch.full((dim,), 0.0 if squash else 1.0))
        made = catalogue.find(inner, "memory").make(dim, **(arguments or {})) if isinstance(inner, str) else inner
        self.inner: Memory = made
        if self.inner.dim != dim:
            raise ValueError(f"SMR: the inner memory must have dim={dim}, got {self.inner.dim}.")

    def initial_state(self, batch: int) -> State:
        return {"conv": self.conv.initial_state(batch), "inner": self.inner.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        factor, conv = self.conv(x, state["conv"])
        factor = 2 * torch.sigmoid(factor) if self.squash else factor
        y, inner = self.inner(x * factor.to(x.dtype), state["inner"])
        return y, {"conv": conv, "inner": inner}
