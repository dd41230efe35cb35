"""Momentum as what it is: a memory of gradients, with a structure, an objective and a retention of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.errors import CheckpointError
from remanence.ops.inner_network import fast_weight_read, inner_gradient
from remanence.ops.newton_schulz import newton_schulz

SOURCE = "arXiv:2512.24695"


def as_matrix(gradient: Tensor) -> Tensor:
    """Rows of outputs, columns of all else; a vector is one row."""
    return gradient.reshape(1, -1) if gradient.ndim < 2 else gradient.flatten(1)


def check_rate(where: str, **rates: float) -> None:
    """Raise `ValueError` for a rate that is not above zero and finite."""
    for name, value in rates.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{where}: {name} must be > 0 and finite, got {value!r}.")


class Remembering:
    """An optimiser that keeps some tensors for each parameter.

    A subclass writes `memory`, those tensors at the start, and `update`, which alters them and the parameter.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        check_rate(type(self).__name__, lr=lr)
        given = [p for p in parameters if p.requires_grad]
        self.param_groups: list[dict[str, Any]] = [{"params": given, "lr": lr}]
        self.state = {p: self.memory(p) for p in given}

    def memory(self, p: Tensor) -> dict[str, Tensor]:
        """What is kept for `p`, before the first step."""
        raise TypeError(f"{type(self).__name__} must define memory.")

    def update(self, p: Tensor, gradient: Tensor, memory: dict[str, Tensor], lr: float) -> None:
        """One step: alter `p` and its memory, in place."""
        raise TypeError(f"{type(self).__name__} must define update.")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for p in self.state:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """What is kept, in the order of the parameters, and the rates."""
        held = {str(i): dict(memory) for i, memory in enumerate(self.state.values())}
        return {"state": held, "lr": [group["lr"] for group in self.param_groups]}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises: `CheckpointError`, changing nothing, when it does not fit."""
        pairs: list[tuple[Tensor, Tensor]] = []
        held = tree.get("state", {})
        for i, memory in enumerate(self.state.values()):
            theirs = held.get(str(i), {})
            for name, tensor in memory.items():
                if len(held) != len(self.state) or name not in theirs or theirs[name].shape != tensor.shape:
                    raise CheckpointError(f"The optimiser's state is of another model: tensor {i} ({name!r}) differs.")
                pairs.append((tensor, theirs[name]))
        for tensor, value in pairs:
            tensor.copy_(value)
        for group, lr in zip(self.param_groups, tree["lr"], strict=True):
            group["lr"] = lr


class GradientMemory(Remembering):
    r"""Gradient descent whose momentum is an associative memory of the gradients, read with the newest.

    With $G$ a parameter's gradient as a matrix, $\hat G$ the same at unit size, and $P$ a preconditioner:

    | structure | objective | memory | answer $o$ |
    |---|---|---|---|
    | matrix | dot | $m ← βm + ηPG$, the heavy ball | $m$ |
    | matrix | squared | $m ← βm + η(PG - m\hat G^\top\hat G)$: what it held for these directions is replaced | $m$ |
    | network | either | a perceptron $m$ descends its loss on the pairs $(\hat g, P\hat g)$ of rows | $m(\hat G)‖G‖$ |

    Then $W ← W - λσ(o)$, λ = lr, with $σ$ the identity or Newton–Schulz (matrix, dot and Newton–Schulz is Muon).

    Args:
        parameters: what to update, of any shape: the first axis counts as rows; a vector is one row.
        lr: λ > 0; schedules change `param_groups[0]["lr"]`.
        structure: `"matrix"`, or `"network"`: one hidden layer of GELUs, which reads and learns all rows at once.
        objective: `"dot"` −⟨m(ĝ), Pĝ⟩, or `"squared"` ½‖m(ĝ) − Pĝ‖², the mean over rows.
        retain: β in [0, 1]; a network decays towards its start.
        step: η > 0, up to 1; a network divides it by `hidden`, to be stable at any width.
        precondition: None, or `"rms"`: $P$ divides by the root of a running mean of squares, as in Adam (decay 0.999).
        output: σ: None or `"newton-schulz"`.
        hidden: units of the network.

    Keeps per parameter one tensor of its size (matrix), or 3 · hidden · columns numbers (network); one more with
    a preconditioner. In the paper the squared objective has the gradient itself where this has it at unit size: else
    what is replaced would depend on the scale of the loss.
    Raises: `ValueError` for arguments out of range.
    Source: Nested Learning (2025), arXiv:2512.24695, on optimisers as associative memories, which leaves the
        network, its targets and its rate open.

    >>> layer = nn.Linear(3, 2)
    >>> muon = GradientMemory(layer.parameters(), lr=0.02, retain=0.95, output="newton-schulz")
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-2,
        *,
        structure: Literal["matrix", "network"] = "matrix",
        objective: Literal["dot", "squared"] = "dot",
        retain: float = 0.9,
        step: float = 1.0,
        precondition: Literal["rms"] | None = None,
        output: Literal["newton-schulz"] | None = None,
        hidden: int = 16,
    ):
        answers = {
            "structure": (structure, ("matrix", "network")),
            "objective": (objective, ("dot", "squared")),
            "precondition": (precondition, (None, "rms")),
            "output": (output, (None, "newton-schulz")),
        }
        for name, (value, known) in answers.items():
            if value not in known:
                raise ValueError(f"GradientMemory: {name} must be {' or '.join(map(repr, known))}, got {value!r}.")
        check_rate("GradientMemory", step=step, hidden=hidden)
        if not 0 <= retain <= 1:
            raise ValueError(f"GradientMemory: retain must lie in [0, 1], got {retain!r}.")
        self.structure, self.objective, self.retain, self.eta = structure, objective, retain, step
        self.precondition, self.output, self.hidden = precondition, output, hidden
        super().__init__(parameters, lr)

    def memory(self, p: Tensor) -> dict[str, Tensor]:
        held = {}
        if self.structure == "matrix":
            held["m"] = torch.zeros_like(p)
        else:
            columns = as_matrix(p).shape[1]
            start = torch.randn(self.hidden, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            held["start"] = start.to(p)
            held["0"], held["1"] = held["start"].clone(), held["start"].new_zeros(columns, self.hidden)
        if self.precondition:
            held["square"], held["count"] = torch.zeros_like(p), p.new_zeros(())
        return held

    def update(self, p: Tensor, gradient: Tensor, memory: dict[str, Tensor], lr: float) -> None:
        G = as_matrix(gradient)
        target = G
        if self.precondition:
            memory["count"] += 1
            mean = memory["square"].lerp_(gradient.square(), 1e-3) / -torch.expm1(memory["count"] * -1.0005003e-3)
            target = as_matrix(gradient / (mean.sqrt() + 1e-8))
        answer = (self._matrix if self.structure == "matrix" else self._network)(G, target, memory)
        if self.output:
            answer = newton_schulz(answer / (torch.linalg.matrix_norm(answer) + 1e-30))
        p.sub_(answer.view_as(p), alpha=lr)

    def _matrix(self, G: Tensor, target: Tensor, memory: dict[str, Tensor]) -> Tensor:
        m = as_matrix(memory["m"])
        written = self.eta * target
        if self.objective == "squared":
            unit = G / (torch.linalg.matrix_norm(G) + 1e-30)
            written = written - self.eta * torch.linalg.multi_dot([m, unit.mT, unit])
        return m.mul_(self.retain).add_(written)

    def _network(self, G: Tensor, target: Tensor, memory: dict[str, Tensor]) -> Tensor:
        size, aim = (torch.linalg.matrix_norm(x) / len(x) ** 0.5 + 1e-30 for x in (G, target))
        weights, key, value = [memory["0"], memory["1"]], G / size, target / aim
        if self.objective == "dot":
            value = value + fast_weight_read(key, weights)  # its squared error's gradient is then that of −⟨m(ĝ), Pĝ⟩
        inputs, deltas = inner_gradient(key, value, weights, residual=False)
        for W, x, delta, start in zip(weights, inputs, deltas, (memory["start"], None), strict=True):
            W.mul_(self.retain).sub_(delta.mT @ x, alpha=self.eta / (self.hidden * len(G)))
            if start is not None:
                W.add_(start, alpha=1 - self.retain)
        return fast_weight_read(key, weights) * aim


@card(
    "delta-momentum",
    covers="nested-learning",
    kind="optimizer",
    says="Momentum that replaces what it held for a gradient's directions before it writes them anew.",
    source=SOURCE,
    small={"lr": 0.05},
)
def delta_momentum(parameters: Iterable[nn.Parameter], lr: float = 1e-2, **arguments: Any) -> GradientMemory:
    """`GradientMemory` with the squared objective; `arguments` are its others."""
    return GradientMemory(parameters, lr, objective="squared", **arguments)


@card(
    "deep-momentum",
    covers="nested-learning",
    kind="optimizer",
    says="Momentum that is a small network, trained on the gradients it is to answer.",
    source=SOURCE,
    small={"lr": 0.05},
)
def deep_momentum(parameters: Iterable[nn.Parameter], lr: float = 1e-2, **arguments: Any) -> GradientMemory:
    """`GradientMemory` with a network for memory; `arguments` are its others."""
    return GradientMemory(parameters, lr, structure="network", **arguments)


@card(
    "preconditioned-momentum",
    covers="nested-learning",
    kind="optimizer",
    says="Momentum that remembers gradients as a preconditioner maps them.",
    source=SOURCE,
    small={"lr": 0.01},
)
def preconditioned_momentum(parameters: Iterable[nn.Parameter], lr: float = 1e-3, **arguments: Any) -> GradientMemory:
    """`GradientMemory` whose targets are gradients over their root mean square; `arguments` are its others."""
    return GradientMemory(parameters, lr, precondition="rms", **arguments)
