"""How well a stream was predicted, how much was kept, and what a sequence of tasks gave and cost.

The matrix of scores R has a row per moment and a column per task: `R[i, j]` is the score on task j (from 0) after
i tasks were learned, row 0 being the untrained model, so R is [tasks + 1, tasks]. Scores are accuracies unless
`higher_is_better=False`, then losses. Whatever they are, forgetting above 0 is bad and transfer above 0 is good;
averages and worst cases are in the units of the scores.
"""

from __future__ import annotations

import lzma
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remanence.errors import ShapeError


class Prequential:
    """Bits per byte of predictions that were each made before the byte was learned, over all and over the last bytes.

    The prequential code length −Σ log₂ p(x_t | x_<t) is also what an arithmetic coder would write, so the figure
    compares with a compressor's. Source: Dawid, "Prequential analysis" (1984).

    Args:
        window: bytes that `recent` looks back on; the pieces observed are kept whole until they lie outside it.
    """

    def __init__(self, window: int = 8192):
        self.window, self.bits, self.bytes = window, 0.0, 0
        self._pieces: deque[tuple[float, int]] = deque()

    def observe(self, bits: float, count: int) -> None:
        """Count `count` ≥ 0 bytes that together cost `bits`."""
        if not count:
            return
        self.bits, self.bytes = self.bits + bits, self.bytes + count
        self._pieces.append((bits, count))
        held = sum(n for _, n in self._pieces)
        while held - self._pieces[0][1] >= self.window:
            held -= self._pieces.popleft()[1]

    @property
    def bits_per_byte(self) -> float:
        """Mean over everything observed; nan before the first byte."""
        return self.bits / self.bytes if self.bytes else float("nan")

    @property
    def recent(self) -> float:
        """Mean over the last pieces that together hold `window` bytes, or over all; nan before the first byte."""
        return sum(b for b, _ in self._pieces) / sum(n for _, n in self._pieces) if self._pieces else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON has it."""
        return {"bits": self.bits, "bytes": self.bytes, "pieces": [list(piece) for piece in self._pieces]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bits, self.bytes = float(state["bits"]), int(state["bytes"])
        self._pieces = deque((float(bits), int(count)) for bits, count in state["pieces"])


class Retention:
    """What each domain's held-back text costs once the domain is over: then, at the end, and at the worst in between.

    Kept in constant memory per domain. A domain that comes back and ends again keeps its first ending: what matters is
    what was lost since it was first learned. The worst value since learned is the stability gap's worst case.
    Source: De Lange et al., arXiv:2205.13452 (2022), for losses instead of accuracies.
    """

    def __init__(self) -> None:
        self._latest: dict[str, tuple[int, float]] = {}
        self._ended: dict[str, tuple[int, float]] = {}
        self._worst: dict[str, float] = {}

    def record(self, position: int, domain_scores: Mapping[str, float]) -> None:
        """Scores in bits per byte (lower is better) of the model after `position` bytes; any domains, any time."""
        for domain, score in domain_scores.items():
            self._latest[domain] = position, float(score)
            if domain in self._ended:
                if position <= self._ended[domain][0]:
                    self._ended[domain] = self._ended[domain][0], float(score)
                    self._worst[domain] = float(score)
                self._worst[domain] = max(self._worst[domain], float(score))

    def ended(self, domain: str, position: int) -> None:
        """`domain` is over at `position`; its score then is the latest recorded, or one recorded next at `position`."""
        if domain not in self._ended:
            score = self._latest.get(domain, (0, float("nan")))[1]
            self._ended[domain] = position, score
            self._worst[domain] = score

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Per domain `when_ended`, `at_end` and `worst_since`, in bits per byte; None for what is not known yet."""

        def known(score: float) -> float | None:
            return None if score != score else score

        nothing = float("nan")
        return {
            domain: {
                "when_ended": known(self._ended.get(domain, (0, nothing))[1]),
                "at_end": known(self._latest.get(domain, (0, nothing))[1]),
                "worst_since": known(self._worst.get(domain, nothing)),
            }
            for domain in dict.fromkeys([*self._ended, *self._latest])
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON has it."""
        return {
            "latest": {domain: list(pair) for domain, pair in self._latest.items()},
            "ended": {domain: list(pair) for domain, pair in self._ended.items()},
            "worst": dict(self._worst),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._latest = {domain: (int(at), float(score)) for domain, (at, score) in state["latest"].items()}
        self._ended = {domain: (int(at), float(score)) for domain, (at, score) in state["ended"].items()}
        self._worst = {domain: float(score) for domain, score in state["worst"].items()}


def average_score(R: ArrayLike, after: int | None = None) -> float:
    """Mean score on the tasks learned so far, A_i = 1/i · Σ_{j≤i} R[i,j], in the range of the scores.

    `after` is i, by default all tasks. Source: Lopez-Paz & Ranzato, arXiv:1706.08840 (2017).
    """
    scores, i = _matrix(R, after)
    return float(scores[i, :i].mean())


def average_incremental_score(R: ArrayLike) -> float:
    """Mean of A_i over i = 1 … T, in the range of the scores. Source: Rebuffi et al., arXiv:1611.07725 (2017)."""
    scores, tasks = _matrix(R)
    return float(np.mean([scores[i, :i].mean() for i in range(1, tasks + 1)]))


def forgetting(R: ArrayLike, after: int | None = None, *, higher_is_better: bool = True) -> float:
    """Mean fall from the best score since learned, F_i = 1/(i−1) · Σ_{j<i} (max_{j≤l<i} R[l,j] − R[i,j]).

    Above 0 is forgetting, for losses too (there it is the mean rise above the lowest loss); below 0, improvement. In
    [−1, 1] for accuracies; nan for a single task. Source: Chaudhry et al., arXiv:1801.10112 (2018).
    """
    scores, i = _matrix(R, after, higher_is_better)
    falls = [scores[j + 1 : i, j].max() - scores[i, j] for j in range(i - 1)]
    return float(np.mean(falls)) if falls else float("nan")


def backward_transfer(R: ArrayLike, *, higher_is_better: bool = True) -> float:
    """What later tasks did to earlier ones, BWT = 1/(T−1) · Σ_{j<T} (R[T,j] − R[j,j]).

    Above 0 is a gain, for losses too. In [−1, 1] for accuracies; nan for a single task.
    Source: Lopez-Paz & Ranzato, arXiv:1706.08840 (2017).
    """
    scores, tasks = _matrix(R, None, higher_is_better)
    gains = [scores[tasks, j] - scores[j + 1, j] for j in range(tasks - 1)]
    return float(np.mean(gains)) if gains else float("nan")


def forward_transfer(R: ArrayLike, baseline: ArrayLike | None = None, *, higher_is_better: bool = True) -> float:
    """What earlier tasks did for those not yet learned, FWT = 1/(T−1) · Σ_{j≥2} (R[j−1,j] − b_j).

    `baseline` is b, the scores [T] of an untrained model, by default row 0 of R. Above 0 is a gain, for losses too. In
    [−1, 1] for accuracies; nan for a single task. Source: Lopez-Paz & Ranzato, arXiv:1706.08840 (2017).
    """
    scores, tasks = _matrix(R, None, higher_is_better)
    start = scores[0] if baseline is None else np.asarray(baseline, float) * (1 if higher_is_better else -1)
    if start.shape != (tasks,):
        raise ShapeError(f"forward_transfer: baseline must be [tasks={tasks}], got {list(start.shape)}.")
    gains = [scores[j, j] - start[j] for j in range(1, tasks)]
    return float(np.mean(gains)) if gains else float("nan")


def worst_since_learned(curve: ArrayLike, ends: Sequence[int], *, higher_is_better: bool = True) -> float:
    """min-ACC_k = 1/(k−1) · Σ_{j<k} min_{t_j<n≤t} a(j,n): mean over earlier tasks of the worst since learned.

    `curve` is a, [evaluations, k]: scores on each task after each evaluation n, up to now; `ends[j]` is t_j, the row
    at which task j ended; the last task, still running, has none. For losses the highest is the worst. In the range
    of the scores; nan for a single task. Source: De Lange et al., arXiv:2205.13452 (2022).
    """
    scores = _curve(curve, ends, higher_is_better)
    worst = [scores[end + 1 :, j].min() for j, end in enumerate(ends)]
    return float(np.mean(worst)) * (1 if higher_is_better else -1) if worst else float("nan")


def worst_case_score(curve: ArrayLike, ends: Sequence[int], *, higher_is_better: bool = True) -> float:
    """WC-ACC = 1/k · a(k,t) + (1 − 1/k) · min-ACC_k: the running task now and the others at their worst since learned.

    Arguments, range and source as in `worst_since_learned`; for a single task its score now.
    """
    scores = np.asarray(curve, float)
    _curve(curve, ends, higher_is_better)
    k = scores.shape[1]
    rest = worst_since_learned(curve, ends, higher_is_better=higher_is_better) if ends else 0.0
    return float(scores[-1, -1]) / k + (1 - 1 / k) * rest


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of `xz -9e` on `data`, container included; nan for no data.

    The dictionary is no larger than the data, which changes no byte that can be referred to and spares the 674 MiB that
    preset 9 reserves whatever it is given.
    """
    if not data:
        return float("nan")
    size = min(max(len(data), 4096), 1 << 26)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return 8 * len(lzma.compress(data, filters=filters)) / len(data)


def _matrix(R: ArrayLike, after: int | None = None, higher_is_better: bool = True) -> tuple[NDArray[np.float64], int]:
    scores = np.asarray(R, float)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] + 1 or not scores.shape[1]:
        raise ShapeError(
            f"R must be [tasks + 1, tasks], its first row from the untrained model, got {list(scores.shape)}."
        )
    tasks = scores.shape[1]
    if after is not None and not 1 <= after <= tasks:
        raise ShapeError(f"after must be between 1 and the {tasks} tasks of R, got {after}.")
    return scores if higher_is_better else -scores, tasks if after is None else after


def _curve(curve: ArrayLike, ends: Sequence[int], higher_is_better: bool) -> NDArray[np.float64]:
    scores = np.asarray(curve, float)
    if scores.ndim != 2 or not scores.shape[0] or scores.shape[1] != len(ends) + 1:
        raise ShapeError(
            f"curve must be [evaluations, tasks] with one task more than ends, got {list(scores.shape)} and "
            f"{len(ends)} ends."
        )
    if any(not 0 <= end < scores.shape[0] - 1 for end in ends):
        raise ShapeError(
            f"Each end must be a row of curve with a row after it (0 to {len(scores) - 2}), got {list(ends)}."
        )
    return scores if higher_is_better else -scores
