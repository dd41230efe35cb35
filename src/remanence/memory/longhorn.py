"""Longhorn: a state space whose update is the closed-form answer to an online learning problem."""

from __future__ import annotations

from torch import Tensor, nn

from remanence.catalogue import card
from remanence.memory.mamba import Mamba
from remanence.memory.parts import wide


def implicit_step(beta: Tensor, key: Tensor) -> Tensor:
    """ε = β / (1 + β‖k‖²): with it a gradient step lands on the minimum of ‖s − s'‖² + β (s·k − x)².

    Shapes: beta [..., features], key [..., states] -> [..., features].
    """
    return beta / (1 + beta * key.square().sum(-1, keepdim=True))


@card(
    "longhorn",
    kind="memory",
    says="Mamba's block with the closed-form step of online regression: what a key takes in, it forgets as much of.",
    source="arXiv:2407.14207",
    small={"dim": 6, "states": 3},
)
class Longhorn(Mamba):
    r"""$h_t = (1 - ε_t k_t^2) ⊙ h_{t-1} + ε_t x_t k_t$, read as $y_t = q_t · h_t + D x_t$, in Mamba's block.

    $ε_t = β_t / (1 + β_t ‖k_t‖^2)$, $β_t = σ(W_Δ δ + b_Δ)$: the minimiser of $‖h - h_{t-1}‖^2 + β(h · k - x)^2$, with
    $k k^\top$ replaced by its diagonal as in the published models. So the decay lies in (0, 1] whatever the input, and
    neither rates nor a floor are needed. Arguments, shapes and errors are those of `Mamba`; B and C are key and query.

    Source: Liu et al., Longhorn (2024), arXiv:2407.14207.
    """

    def _init_decay(self) -> None:
        """The published code leaves the projection of β as it is drawn."""
        self.step_size = nn.Sigmoid()
        self.register_parameter("A_log", None)

    def _steps(self, raw: Tensor, B: Tensor) -> Tensor:
        return implicit_step(self.step_size(raw), wide(B))
