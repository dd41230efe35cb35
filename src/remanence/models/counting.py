"""A byte model of fixed size that learns by counting: fast beside the slow learning of a neural network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remanence.errors import RemanenceError, StateError, unknown

SIZES = {"small": 13, "default": 22}


def bit_histories() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """The states of a bit history: successors [256 × 2], total count [256], first guess of P(1) [256].

    A history is the whole sequence up to three bits, then (zeros, ones, last bit). The more one bit has been seen
    the less of the other is remembered, so that the states fit a byte and old habits give way to new ones.
    """
    most = (40, 22, 12, 9, 7, 6, 5)

    def after(state: tuple[int, ...], y: int) -> tuple[int, ...]:
        kind, *rest = state
        if kind == 0 and len(rest) < 3:
            return (0, *rest, y)
        n = [rest.count(0), rest.count(1)] if kind == 0 else [rest[0], rest[1]]
        n[y] += 1
        if n[1 - y] > 3:
            n[1 - y] = 3 + (n[1 - y] - 3) * 2 // 3
        few, many = sorted((0, 1), key=lambda b: n[b])
        n[few] = min(n[few], len(most) - 1)
        n[many] = min(n[many], most[n[few]])
        return (1, n[0], n[1], y if n[0] and n[1] else 0)

    number: dict[tuple[int, ...], int] = {(0,): 0}
    queue = list(number)
    for state in queue:
        for y in (0, 1):
            successor = after(state, y)
            if successor not in number:
                number[successor] = len(number)
                queue.append(successor)
    follow = np.zeros((256, 2), np.uint8)
    weight = np.zeros(256, np.uint8)
    guess = np.full(256, 0.5, np.float32)
    for state, i in number.items():
        kind, *rest = state
        n0, n1 = (rest.count(0), rest.count(1)) if kind == 0 else (rest[0], rest[1])
        follow[i] = [number[after(state, y)] for y in (0, 1)]
        weight[i] = n0 + n1
        guess[i] = (n1 + 0.4) / (n0 + n1 + 0.8)
    return follow.reshape(-1), weight, guess


def compile_apart() -> None:
    """Compile the kernels in another process, where they were not compiled before.

    The compiler's memory, some 150 MB, would otherwise stay with a process that runs for ever.
    """
    from remanence.models import _counting_kernels as kernels

    source = Path(kernels.__file__)
    compiled = Path(kernels.observe.stats.cache_path or source.parent).glob(f"{source.stem}.observe-*.nbi")
    if not any(index.stat().st_mtime >= source.stat().st_mtime for index in compiled):
        code = f"from {__name__} import CountingModel as C; m = C(size=10); m.observe(b'ab'); m.distribution()"
        subprocess.run([sys.executable, "-c", code], check=False)


class CountingModel:
    """Predicts the next byte from counts of what followed in many contexts, and learns each byte once it is known.

    Args:
        size: "small" (under 8 MB), "default" (about 80 MB), or s for ¾ · 2ˢ slots in the table.
        neural: whether a neural network's byte distribution may be given, as one more opinion for the gates to weigh.
        seed: kept for the sake of one interface; counting draws no random numbers.

    Units: bits (negative base-2 logarithms of probabilities).
    Source: context mixing, Mahoney 2005, "Adaptive weighing of context models for lossless data compression".

    >>> model = CountingModel(size="small")
    >>> bits = model.observe(b"abcabcabcabcabcabcabc")
    >>> bool(bits[-1] < bits[0])
    True
    """

    def __init__(self, *, size: str | int = "default", neural: bool = True, seed: int = 0):
        from remanence.models import _counting_kernels as kernels  # Numba is slow to import

        if isinstance(size, str):
            if size not in SIZES:
                raise unknown("size", size, SIZES)
            size = SIZES[size]
        if not 10 <= size <= 26:
            raise RemanenceError(f"CountingModel: size must be 10 to 26 bits, got {size}.")
        self.bits, self.neural, self.seed = size, neural, seed
        self._kernels = kernels
        k = kernels
        follow, weight, guess = bit_histories()
        odds = (np.arange(4096) + 0.5) / 4096
        places, direct_bits = 3 << (size - 2), min(size, 19)
        self._scratch = k.Scratch(
            next_state=follow,
            weight=weight,
            stretch=np.log(odds / (1 - odds)).astype(np.float32),
            hashes=np.zeros(k.N, np.int64),
            slot=np.zeros(k.N, np.int64),
            x=np.zeros(k.INPUTS, np.float32),
            direct_hash=np.zeros(k.D, np.int64),
            direct_at=np.zeros(k.D, np.int64),
            row=np.zeros(k.SETS, np.int64),
            p1=np.zeros(k.SETS, np.float64),
            x2=np.zeros(k.SETS, np.float32),
            tree=np.ones(512, np.float64),
            at=np.zeros(16, np.int64),
            f=np.zeros(4, np.float64),
        )
        steps = (np.arange(k.APM_STEPS) - 16) / 2
        domains = 8 if size > SIZES["small"] else 3
        gate1 = np.zeros((domains * int(k.ROWS[-1]), k.INPUTS), np.float32)
        gate1[:, 0 : k.N * k.PER : k.PER] = 0.15
        gate1[:, k.MATCH] = 0.25
        gate1[:, k.NEURAL] = 0.3
        match = np.full((2, 32, 8, 2), 0.5, np.float32)
        match[..., 0], match[..., 1] = 0.1, 0.9
        self._tables = k.Tables(
            check=np.zeros(places, np.uint16),
            slots=np.zeros(places * 16 + 16, np.uint8),
            history_p=np.tile(guess, domains * k.N),
            history_n=np.zeros(domains * k.N * 256, np.uint16),
            run_p=np.full(domains * k.N * k.RUNS * 4, 0.7, np.float32),
            direct=np.full(k.D << direct_bits, 0x8000, np.uint16),
            styles=np.zeros((domains, k.KINDS), np.float32),
            styles_n=np.zeros(1, np.int64),
            match_p=np.tile(match.reshape(-1), domains),
            after1=np.zeros(256, np.int64),
            after2=np.zeros(65536, np.int64),
            gate1=gate1,
            gate1_n=np.zeros(gate1.shape[0], np.int64),
            gate2=np.full((domains * 256, k.SETS), 1 / k.SETS, np.float32),
            gate2_n=np.zeros(domains * 256, np.int64),
            apm=np.tile(1 / (1 + np.exp(-steps)), 2 << min(size, 14)).astype(np.float32),
        )
        self._position = k.Position(
            now=np.zeros(k.POSITION, np.int64),
            ring=np.zeros(1 << min(size, 22), np.uint8),
            places=np.zeros(2 << min(size - 2, 19), np.int32),
            style=np.zeros(k.KINDS, np.float32),
        )
        self.reset_position()

    def observe(
        self,
        data: bytes | NDArray[np.uint8],
        neural_logprobs: NDArray[np.float32] | None = None,
        *,
        learn: bool = True,
    ) -> NDArray[np.float64]:
        """Bits [T] that each byte of `data` cost: each is predicted from those before it, then learned.

        Args:
            data: T bytes, T ≥ 0.
            neural_logprobs: natural logarithms [T, 256] of a network's distribution for each byte, or None.
            learn: False leaves all that is learned bit for bit as it is; only the position moves.
        Raises: `RemanenceError` on data that are not bytes or log-probabilities of another shape.
        """
        if isinstance(data, bytes | bytearray | memoryview):
            data = np.frombuffer(data, np.uint8)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
            got = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
            raise RemanenceError(f"CountingModel: data must be bytes or a uint8 array [T], got {got}.")
        cost = np.zeros(data.size, np.float64)
        given = self._opinion(neural_logprobs, (data.size, 256))
        self._kernels.observe(
            self._tables,
            self._position,
            self._scratch,
            np.ascontiguousarray(data).copy(),
            given if given is not None else np.zeros((1, 256), np.float32),
            given is not None,
            learn,
            cost,
        )
        return cost

    def distribution(self, neural_logprobs: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        """Probabilities [256] of the next byte; they sum to 1, none is 0, and nothing changes."""
        out = np.zeros(256, np.float64)
        given = self._opinion(neural_logprobs, (256,))
        self._kernels.distribution(
            self._tables,
            self._position,
            self._scratch,
            given if given is not None else np.zeros(256, np.float32),
            given is not None,
            out,
        )
        return out

    def _opinion(self, logprobs: Any, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        if logprobs is None:
            return None
        if not self.neural:
            raise RemanenceError("CountingModel: neural_logprobs were given to a model made with neural=False.")
        if not isinstance(logprobs, np.ndarray) or logprobs.shape != shape:
            got = list(logprobs.shape) if isinstance(logprobs, np.ndarray) else type(logprobs).__name__
            raise RemanenceError(f"CountingModel: neural_logprobs must be an array {list(shape)}, got {got}.")
        if np.isnan(logprobs).any():
            raise RemanenceError("CountingModel: neural_logprobs must be log-probabilities, got NaN among them.")
        return np.ascontiguousarray(logprobs, np.float32)

    def position(self) -> dict[str, NDArray[Any]]:
        """A copy of all that moves with the text: recent bytes, context hashes, the matched place, the history."""
        return {name: array.copy() for name, array in self._position._asdict().items()}

    def set_position(self, position: dict[str, NDArray[Any]]) -> None:
        """Go to a position that `position` gave. Raises: `StateError` when it is of another model."""
        _restore("position", self._position._asdict(), position)

    def reset_position(self) -> None:
        """Begin a fresh text: no recent bytes, no match. What was counted, and the history to match in, are kept."""
        now, k = self._position.now, self._kernels
        seen = now[k.SEEN]
        now[:] = 0
        self._position.style[:] = 0
        now[k.SEEN] = now[k.LINE] = seen
        now[k.ABOVE] = -1

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """A copy of everything, by name: a model of the same size that loads it goes on bit for bit the same."""
        return {name: array.copy() for name, array in self.arrays().items()}

    def load_state_dict(self, state: dict[str, NDArray[Any]]) -> None:
        """Take over what `state_dict` gave. Raises: `StateError`, leaving all as it was, when it does not fit."""
        _restore("state", self.arrays(), state)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `state_dict` copies: the live arrays by name."""
        return {f"tables.{n}": a for n, a in self._tables._asdict().items()} | {
            f"position.{n}": a for n, a in self._position._asdict().items()
        }

    def nbytes(self) -> int:
        """Bytes kept, whatever has been read."""
        return sum(array.nbytes for array in (*self._tables, *self._position))


def _restore(what: str, own: dict[str, NDArray[Any]], given: dict[str, NDArray[Any]]) -> None:
    """Copy `given` into the arrays of `own`, all or nothing."""
    if missing := own.keys() - given.keys():
        raise StateError(f"CountingModel: this {what} belongs to another model: it has no {sorted(missing)[0]!r}.")
    if extra := given.keys() - own.keys():
        raise StateError(f"CountingModel: this {what} belongs to another model: {sorted(extra)[0]!r} is not expected.")
    for name, array in own.items():
        new = given[name]
        if not isinstance(new, np.ndarray) or new.shape != array.shape or new.dtype != array.dtype:
            got = f"{new.dtype} {list(new.shape)}" if isinstance(new, np.ndarray) else type(new).__name__
            raise StateError(
                f"CountingModel: {what} {name!r} must be {array.dtype} {list(array.shape)}, got {got}: "
                "it is of a model of another size."
            )
    for name, array in own.items():
        array[...] = given[name]
