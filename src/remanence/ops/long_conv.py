"""Causal convolution with long finite kernels. Axes: B batch, T time, D features, O features out, L kernel length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from remanence.errors import ShapeError, expect
from remanence.ops.decay import recurrent_dtype
from remanence.ops.taps import tapped
from remanence.state import State

BLOCK, GROUP = 64, 512
"""Tokens that are convolved by one product, and those whose convolutions are held at once."""
FEW = 4
"""Up to so many tokens are summed directly: a transform would cost more."""


def long_conv_reference(x: Tensor, kernel: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """The definition: y_t = Σ_{l<L} kernel_l x_{t−l}, one token after another."""
    tail, past_first = _tail(x, kernel, state), kernel.flip(-1)
    y = []
    for t in range(x.shape[1]):
        seen = torch.cat([tail, x[:, t : t + 1]], 1)
        y.append(torch.einsum(_sum(kernel), seen, past_first.to(seen.dtype)))
        tail = seen[:, 1:]
    return (torch.stack(y, 1).to(x.dtype) if y else _nothing(x, kernel)), {"tail": tail}


@tapped
def long_conv(x: Tensor, kernel: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """y_t = Σ_{l<L} kernel_l x_{t−l}, by transforms of overlapping blocks; the state is the last L − 1 inputs.

    Shapes: `x` [B, T, D], any T ≥ 0; `kernel` [D, L], each feature by itself, or [O, D, L], mixing them, L ≥ 1; its
    first column meets the present token; y [B, T, D] or [B, T, O]; state {"tail": [B, L − 1, D]}, float32 or wider.
    Cost per token: log L per feature (and O per feature when mixing), and L for a single token.
    Raises: `ShapeError`.
    Source: overlap-save, Stockham, High-Speed Convolution and Correlation (1966).
    """
    if kernel.ndim not in (2, 3) or not kernel.shape[-1]:
        raise ShapeError(
            "long_conv: kernel must be [features, length] or [features out, features, length], of length at least 1, "
            f"got {list(kernel.shape)}."
        )
    expect("long_conv", "x", x, "batch time features", features=kernel.shape[-2])
    T, L = x.shape[1], kernel.shape[-1]
    if not T:
        return long_conv_reference(x, kernel, state)
    seen = torch.cat([_tail(x, kernel, state), x], 1)
    kernel = kernel.to(seen.dtype)
    if T <= FEW:
        windows = [seen[:, t : t + L] for t in range(T)]
        y = torch.stack([torch.einsum(_sum(kernel), window, kernel.flip(-1)) for window in windows], 1)
    else:
        y = _overlap_save(seen, kernel)
    return y.to(x.dtype), {"tail": seen[:, T:]}


def _overlap_save(seen: Tensor, kernel: Tensor) -> Tensor:
    """The T last outputs of L − 1 + T inputs: the L − 1 first of each block are wrapped around, and dropped."""
    S, L = seen.shape[1], kernel.shape[-1]
    n = _fast_size(min(S, max(4 * L, 512)))
    step = n - L + 1
    blocks = -(-(S - L + 1) // step)
    rows = torch.nn.functional.pad(seen.mT, (0, blocks * step + L - 1 - S)).unfold(-1, n, step)  # [B, D, blocks, n]
    spectrum, response = torch.fft.rfft(rows), torch.fft.rfft(kernel, n)
    if kernel.ndim == 2:
        product = spectrum * response[:, None]
    else:
        product = torch.einsum("bdnf,odf->bonf", spectrum, response)
    y = torch.fft.irfft(product, n)[..., L - 1 :]
    return y.flatten(2)[..., : S - L + 1].mT


def _fast_size(least: int) -> int:
    """The next length 2ᵏ or 3·2ᵏ, which transforms are fast at."""
    power = 1 << (least - 1).bit_length()
    return 3 * power // 4 if least <= 3 * power // 4 and power >= 4 else power


@tapped
def basis_conv(x: Tensor, basis: Tensor, weight: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """`long_conv` with the mixing kernel `weight` @ `basis`: few functions of the lag, whose products are never formed.

    Every feature is convolved with each function, by products with Toeplitz matrices; then one map mixes them all.

    Shapes: `x` [B, T, D], any T ≥ 0; `basis` [H, L], L ≥ 1; `weight` [O, D, H]; y [B, T, O]; state {"tail":
    [B, L − 1, D]}. Cost per token: H · D · (O + L + 64) products; memory for the gradients as for the inputs alone.
    Raises: `ShapeError`.
    """
    expect("basis_conv", "basis", basis, "functions length")
    H, L = basis.shape
    expect("basis_conv", "weight", weight, "features_out features functions", functions=H)
    expect("basis_conv", "x", x, "batch time features", features=weight.shape[1])
    T = x.shape[1]
    seen = torch.cat([_tail(x, basis, state), x], 1)
    if T == 1:  # the weights as they lie: turning them would take longer than all the rest
        found = seen.mT @ basis.to(seen.dtype).flip(-1).mT
        now = torch.nn.functional.linear(found.flatten(1), weight.to(seen.dtype).flatten(1))
        return now[:, None].to(x.dtype), {"tail": seen[:, 1:]}
    basis, mix = basis.to(seen.dtype), weight.to(seen.dtype).permute(2, 1, 0).flatten(0, 1)
    C = max(1, min(T, BLOCK))
    shifted = torch.nn.functional.pad(basis.flip(-1), (C - 1, C - 1)).unfold(-1, C + L - 1, 1).flip(1)
    toeplitz = shifted.transpose(0, 1).flatten(0, 1)  # row (t, h), column s: h at lag t + L − 1 − s

    def piece(window: Tensor, toeplitz: Tensor, mix: Tensor) -> Tensor:
        n = window.shape[1] - L + 1
        rows = torch.nn.functional.pad(window, (0, 0, 0, -n % C)).unfold(1, C + L - 1, C).mT
        return (toeplitz @ rows).unflatten(2, (C, -1)).flatten(3).flatten(1, 2)[:, :n] @ mix

    y = [x.new_zeros(x.shape[0], 0, weight.shape[0], dtype=seen.dtype)]
    for start in range(0, T, GROUP):
        window = seen[:, start : start + GROUP + L - 1]
        parts = window, toeplitz, mix
        again = T > GROUP and torch.is_grad_enabled()
        y.append(checkpoint(piece, *parts, use_reentrant=False, preserve_rng_state=False) if again else piece(*parts))
    return torch.cat(y, 1).to(x.dtype), {"tail": seen[:, T:]}


def dilated_conv(x: Tensor, weight: Tensor, dilation: int, state: State | None = None) -> tuple[Tensor, State]:
    """y_t = Σ_{j<K} w_j ⊙ x_{t−j·dilation}: K taps that reach back (K − 1)·dilation tokens.

    Shapes: `x` and y [B, T, D], any T ≥ 0; `weight` [D, K], its first column meeting the present token; `dilation` ≥ 1;
    state {"tail": [B, (K − 1)·dilation, D]}. What lies between the taps does not touch the output at all.
    Its definition is `long_conv_reference` with the kernel that has zeros between the taps.
    Raises: `ShapeError`.
    """
    expect("dilated_conv", "x", x, "batch time features", features=weight.shape[0])
    T, K = x.shape[1], weight.shape[1]
    reach = (K - 1) * dilation
    tail = x.new_zeros(x.shape[0], reach, x.shape[2], dtype=recurrent_dtype(x)) if state is None else state["tail"]
    seen = torch.cat([tail, x], 1)
    y = seen[:, reach:] * weight[:, 0]
    for j in range(1, K):
        y = torch.addcmul(y, seen[:, reach - j * dilation : reach - j * dilation + T], weight[:, j].to(y.dtype))
    return y.to(x.dtype), {"tail": seen[:, T:]}


def _sum(kernel: Tensor) -> str:
    return "bld,dl->bd" if kernel.ndim == 2 else "bld,odl->bo"


def _nothing(x: Tensor, kernel: Tensor) -> Tensor:
    """No outputs of no inputs, of the right width and still part of the graph."""
    return x if kernel.ndim == 2 else x @ kernel[..., 0].mT.to(x.dtype)


def _tail(x: Tensor, kernel: Tensor, state: State | None) -> Tensor:
    if state is not None:
        return state["tail"]
    return x.new_zeros(x.shape[0], kernel.shape[-1] - 1, x.shape[2], dtype=recurrent_dtype(x))
