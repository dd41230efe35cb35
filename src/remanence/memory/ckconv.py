"""CKConv: a causal convolution whose kernel is a small network of relative time."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.parts import Derived, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.long_conv import basis_conv, long_conv
from remanence.state import State


class NormedLinear(nn.Linear):
    """A linear map with the lengths of its rows kept apart (weight norm, arXiv:1602.07868). [..., in] to [..., out]."""

    def __init__(self, wide_in: int, wide_out: int, bound: float):
        super().__init__(wide_in, wide_out)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -1, 1)
        self.gain = nn.Parameter(self.weight.detach().norm(dim=1))

    def scaled(self) -> Tensor:
        """The weights at their lengths, [out, in]."""
        return wide(self.gain)[:, None] * F.normalize(wide(self.weight), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scaled(), wide(self.bias))


class KernelNet(nn.Sequential):
    r"""A network of sines, $x ← \sin(ω(W x + b))$ twice and a linear map: relative positions [L] to values [L, out].

    Source: the initialisation is that of SIREN, arXiv:2006.09661 (2020), with biases uniform in (-1, 1).
    """

    def __init__(self, out: int, *, hidden: int = 32, omega: float = 30.0):
        bound = math.sqrt(6 / hidden) / omega
        super().__init__(
            NormedLinear(1, hidden, 1.0), NormedLinear(hidden, hidden, bound), NormedLinear(hidden, out, bound)
        )
        self.omega = omega

    def sines(self, position: Tensor) -> Tensor:
        """What the last, linear map reads: [L, hidden]."""
        x = position[:, None]
        for layer in list(self)[:-1]:
            x = torch.sin(self.omega * layer(x))
        return x

    def forward(self, position: Tensor) -> Tensor:
        return self[-1](self.sines(position))


@card(
    "ckconv",
    kind="memory",
    says="A convolution over a long horizon whose kernel is a network of time, so that it may be sampled at any rate.",
    source="arXiv:2102.02611",
    small={"dim": 3, "horizon": 6, "hidden": 4, "omega": 3.0},
)
class CKConv(Memory):
    r"""$y_t = b + \sum_{l < L} K(1 - 2l/(L-1)) x_{t-l}$, K a network of sines: position 1 is now, -1 the horizon's end.

    What is older than the horizon is dropped. `at_rate(r)` reads the same signal sampled r times as finely: more taps
    at the same times, each weighing 1/r, smoothed where r > 1 (Gaussian of half a sample). Here now is always at 1; the
    published code anchors the other end.

    Args:
        dim: features of input and output.
        horizon: L, taps at the rate of training.
        hidden: width of the kernel's network.
        omega: ω, how fast a kernel may vary; the paper tunes it between 1 and 100.
        depthwise: each feature by itself; else the kernel mixes features, and has dim²·horizon values.

    Shapes: x and y [batch, time, dim]; state {"tail": [batch, horizon - 1, dim]}, the inputs within the horizon.
    Raises: `ValueError` for a horizon or hidden width below 1; `ShapeError`, `StateError` from `forward`.
    Source: CKConv (2021), arXiv:2102.02611.
    """

    def __init__(self, dim: int, *, horizon: int = 256, hidden: int = 32, omega: float = 30.0, depthwise: bool = False):
        super().__init__()
        if min(horizon, hidden) < 1 or not omega > 0:
            raise ValueError(
                f"CKConv: horizon and hidden must be at least 1 and omega above 0, got {horizon}, {hidden}, {omega}."
            )
        self.dim, self.horizon, self.rate = dim, horizon, 1.0
        self.mix = () if depthwise else (dim,)
        self.net = KernelNet(math.prod((*self.mix, dim)), hidden=hidden, omega=omega)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.timed, self.sampled = Derived(self.past), Derived(self.factors)

    def at_rate(self, rate: float) -> CKConv:
        """The same convolution (the parameters are shared) for signals sampled `rate` times as finely as in training.

        Raises: `ValueError` unless `rate` is above 0.
        """
        if not rate > 0:
            raise ValueError(f"CKConv: rate must be above 0, got {rate}.")
        other = copy.copy(self)
        other.rate, other._form = rate, None
        other.timed, other.sampled = Derived(other.past), Derived(other.factors)
        return other

    @property
    def taps(self) -> int:
        return int((self.horizon - 1) * self.rate) + 1

    def functions(self, *_: Tensor) -> Tensor:
        """The functions of time [hidden + 1, taps] at this rate, the last of them constant."""
        lag = torch.arange(self.taps, dtype=torch.float64, device=self.bias.device)
        position = 1 - lag * (2 / (max(self.horizon - 1, 1) * self.rate))
        basis = F.pad(self.net.sines(position.to(wide(self.bias))), (0, 1), value=1.0).mT / self.rate
        reach = int(self.rate) if self.rate > 1 else 0
        if reach and self.taps > 2 * reach:
            near = torch.arange(-reach, reach + 1, device=basis.device, dtype=basis.dtype)
            blur = torch.softmax(-2 * near.square(), 0)
            inside = F.conv1d(basis[:, None], blur[None, None])[:, 0]
            basis = torch.cat([basis[:, :reach], inside, basis[:, -reach:]], 1)
        return basis

    def past(self, *_: Tensor) -> Tensor:
        """These functions as they meet what is held, the farthest first: [taps, hidden + 1]."""
        return self.functions().flip(-1).mT.contiguous()

    def factors(self, *_: Tensor) -> tuple[Tensor, Tensor]:
        """These functions, and their share in each kernel [..., hidden + 1]."""
        last = self.net[-1]
        assert isinstance(last, NormedLinear)
        weight = torch.cat([last.scaled(), wide(last.bias)[:, None]], 1)
        return self.functions(), weight.unflatten(0, (*self.mix, self.dim))

    def kernel(self) -> Tensor:
        """[dim, dim, taps], or [dim, taps] where depthwise."""
        basis, weight = self.sampled(*self.net.parameters())
        return weight @ basis

    def penalty(self) -> Tensor:
        """The paper's regulariser: the L2 norms of the sampled kernel and of the bias."""
        return self.kernel().norm() + self.bias.norm()

    def initial_state(self, batch: int) -> State:
        return {"tail": zeros(self.bias, batch, self.taps - 1, self.dim)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if self.mix and x.shape[1] == 1 and steps.worth(x, state["tail"]):
            return self._token(x, state["tail"])
        basis, weight = self.sampled(*self.net.parameters())
        if self.mix:
            y, state = basis_conv(wide(x), basis, weight, state)
        else:
            y, state = long_conv(wide(x), weight @ basis, state)
        return (y + wide(self.bias)).to(x.dtype), state

    def _token(self, x: Tensor, tail: Tensor) -> tuple[Tensor, State]:
        """`basis_conv` by the weights as they are: to see whether they are still the same would take longer."""
        *first, last = self.net
        assert isinstance(last, NormedLinear)
        basis = self.timed(*(p for layer in first for p in layer.parameters()))
        y, tail = layer_steps.basis_token(x, tail, basis, (last.weight, last.gain, last.bias), self.bias)
        return y, {"tail": tail}


@card(
    "ckconv-block",
    kind="memory",
    covers="ckconv",
    says="Two continuous-kernel convolutions in a residual block.",
    source="arXiv:2102.02611",
    small={"dim": 3, "horizon": 6, "hidden": 4, "omega": 3.0},
)
class CKBlock(Memory):
    """ReLU(x + f(f(x))), f a convolution, a norm, ReLU and dropout.

    The norm is over the features of each token: the published one also averages over time, the future included.

    Args:
        dim: features of input and output.
        dropout: of both outputs, while training.
        arguments: of both convolutions (`CKConv`).

    Shapes: x and y [batch, time, dim]; state {"0": ..., "1": ...}, one per convolution.
    Raises: as `CKConv`. Source: CKConv (2021), arXiv:2102.02611.
    """

    def __init__(self, dim: int, *, dropout: float = 0.0, **arguments: float):
        super().__init__()
        self.dim = dim
        self.convs = nn.ModuleList([CKConv(dim, **arguments) for _ in range(2)])  # type: ignore[arg-type]
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2)])
        self.dropout = nn.Dropout(dropout)

    def initial_state(self, batch: int) -> State:
        return {str(i): conv.initial_state(batch) for i, conv in enumerate(self.convs)}  # type: ignore[operator]

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state, after, y = self.begin(x, state), {}, x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y, after[str(i)] = conv(y, state[str(i)])
            y = self.dropout(F.relu(norm(y)))
        return F.relu(x + y), after
