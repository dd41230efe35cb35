"""M3: momentum on two time scales, orthogonalised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.ops.newton_schulz import newton_schulz
from remanence.optim.gradient_memory import SOURCE, Remembering, as_matrix, check_rate


@card(
    "m3",
    covers="nested-learning",
    kind="optimizer",
    says="Momentum of every step and momentum of every chunk of steps, both orthogonalised.",
    source=SOURCE,
    small={"lr": 0.02, "divide": False, "period": 3},
)
class M3(Remembering):
    r"""Multi-scale momentum Muon: a fast memory of gradients and a slow one, which moves every `period` steps.

    Each step $m_1 ← m_1 + β_1 G$ and $v ← v + β_2 G^2$; every `period` steps $m_2 ← m_2 + β_3 ΣG$ over them, and
    $O_2 = \mathrm{NS}(m_2)$ is used from the next step on. $W ← W - λ(\mathrm{NS}(m_1) + αO_2) / (\sqrt v + ε)$.
    NS is Newton–Schulz.

    Args:
        parameters: what to update; vectors count as matrices of one row.
        lr: λ > 0; schedules change `param_groups[0]["lr"]`.
        betas: β₁, β₂, β₃ > 0; with `ema` at most 1.
        slow: α ≥ 0, the slow memory's weight.
        period: steps between its updates.
        ema: let the memories decay, $m ← (1 - β)m + βG$. As printed (False) nothing is ever forgotten.
        divide: by √v, as printed. NS has a size of its own, so that division makes steps grow as gradients shrink:
            take `divide=False`, or let the rate fall.
        eps: ε.

    Keeps five tensors of each parameter's size.
    Raises: `ValueError` for arguments out of range.
    Source: Nested Learning (2025), arXiv:2512.24695. `ema` and `divide` are not in the paper.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 3e-4,
        *,
        betas: tuple[float, float, float] = (0.1, 0.01, 0.1),
        slow: float = 0.5,
        period: int = 8,
        ema: bool = True,
        divide: bool = True,
        eps: float = 1e-8,
    ):
        check_rate("M3", period=period, eps=eps, **{f"betas[{i}]": beta for i, beta in enumerate(betas)})
        if ema and max(betas) > 1:
            raise ValueError(f"M3: betas must be at most 1 with ema, got {betas}.")
        if not 0 <= slow < float("inf"):
            raise ValueError(f"M3: slow must be >= 0 and finite, got {slow!r}.")
        self.betas, self.slow, self.period, self.ema, self.divide, self.eps = betas, slow, period, ema, divide, eps
        super().__init__(parameters, lr)

    def memory(self, p: Tensor) -> dict[str, Tensor]:
        held = {name: torch.zeros_like(p) for name in ("fast", "slow", "square", "sum", "direction")}
        return {**held, "count": torch.zeros((), dtype=torch.int64)}

    def update(self, p: Tensor, gradient: Tensor, memory: dict[str, Tensor], lr: float) -> None:
        fast, square, slow = self.betas
        self._write(memory["fast"], gradient, fast)
        self._write(memory["square"], gradient.square(), square)
        direction = _orthogonal(memory["fast"]) + self.slow * memory["direction"]
        if self.divide:
            direction = direction / (memory["square"].sqrt() + self.eps)
        p.sub_(direction, alpha=lr)
        memory["sum"].add_(gradient)
        memory["count"] += 1
        if memory["count"] % self.period == 0:
            self._write(memory["slow"], memory["sum"], slow)
            memory["direction"].copy_(_orthogonal(memory["slow"]))
            memory["sum"].zero_()

    def _write(self, memory: Tensor, value: Tensor, beta: float) -> None:
        memory.mul_(1 - beta if self.ema else 1.0).add_(value, alpha=beta)


def _orthogonal(x: Tensor) -> Tensor:
    matrix = as_matrix(x)
    return newton_schulz(matrix / (torch.linalg.matrix_norm(matrix) + 1e-30)).view_as(x)
