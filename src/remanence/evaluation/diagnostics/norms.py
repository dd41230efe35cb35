"""What bounds a selective state space: the norms of its maps, and its attention form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.mamba import Mamba
from remanence.memory.mamba2 import Mamba2
from remanence.ops.decay import floored
from remanence.ops.taps import Call, tap


def attention_matrix(log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """M_ij = Σ_n C_in exp(g_{j+1,n} + … + g_{i,n}) B_jn for j ≤ i, else 0: y = M x is what the recurrence computes.

    Shapes: all [..., T, N]; M [..., T, T]. Decays may be positive here (an unstable recurrence).
    """
    G = floored(log_decay).double().cumsum(-2)
    future = torch.ones(G.shape[-2], G.shape[-2], dtype=torch.bool, device=G.device).triu(1)
    M = torch.zeros(*torch.broadcast_shapes(B.shape[:-2], G.shape[:-2]), *future.shape, dtype=B.dtype, device=B.device)
    for n in range(B.shape[-1]):  # a state at a time, so that no [T, T, N] is held
        g = G[..., n] if G.shape[-1] > 1 else G[..., 0]
        decay = (g[..., :, None] - g[..., None, :]).masked_fill(future, -torch.inf).exp().to(B.dtype)
        M = M + C[..., :, None, n] * decay * B[..., None, :, n]
    return M


def attention_form(memory: Memory, x: Tensor) -> Tensor:
    """The lower triangular matrix by which a memory's recurrence maps what it writes to what it reads, for this input.

    Row i holds the weights of tokens j ≤ i. It is that of the first recurrence that the layer asks of `remanence.ops`,
    from an empty state; gates, skips and projections stand outside it. It is measured with impulses, so that it holds
    for every recurrence that is linear in its values, delta rules and normalised ones included.

    Shapes: x [batch, time, dim]; [batch, heads, time, time] where heads share a matrix (linear attention, delta
    rules), else [batch, features, time, time] (scans, Mamba), at a cost of `time` readings.
    Raises: `TypeError` for layers that ask no such recurrence.
    """
    found: list[Tensor] = []

    def handler(call: Call) -> Any:
        if call.roles is not None and not found:
            value = call.arguments[call.roles.value]
            same = torch.eye(x.shape[1], dtype=value.dtype, device=value.device)
            if call.roles.time == 2:
                found.append(call.run(**{call.roles.value: same.expand(*value.shape[:2], -1, -1)}, state=None)[0])
            else:
                columns = [call.run(**{call.roles.value: e[:, None].expand_as(value)}, state=None)[0] for e in same]
                found.append(torch.stack(columns, -1).transpose(1, 2))
        return call.run()

    with tap(handler):
        memory(x)
    if not found:
        raise TypeError(f"attention_form: {type(memory).__name__} asks for no recurrence that is linear in its values.")
    return found[0]


@card(
    "ssm-generalization",
    kind="diagnostic",
    says="The norms that bound a selective state space's error: spectral abscissa, input, output and step maps.",
    source="arXiv:2502.01473",
)
def ssm_norms(model: nn.Module, x: Tensor | None = None) -> list[dict[str, Any]]:
    """A row per Mamba or Mamba-2 layer of a model, first to last.

    Each has `layer` (its name), `abscissa` (the largest real part of the state matrix; the bound of the paper does not
    grow with length where it is below 0), `B`, `C`, `step` (spectral norms of the maps from the layer's inner or
    own input to input map, output map and step size), and `input` (the largest norm of a token read, where `x`, the
    model's input, is given; else None).

    Raises: `ValueError` if the model has no such layer.
    Source: Generalization Error Analysis for Selective State-Space Models (2025), arXiv:2502.01473.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Mamba | Mamba2)}
    if not layers:
        raise ValueError("ssm_norms: the model has no selective state space (Mamba or Mamba2) among its layers.")
    bounds: dict[str, float] = {}

    def bound(name: str) -> Any:
        return lambda module, args: bounds.__setitem__(name, float(args[0].norm(dim=-1).max()))

    if x is not None:
        hooks = [layer.register_forward_pre_hook(bound(name)) for name, layer in layers.items()]
        try:
            with torch.no_grad():
                model(x)
        finally:
            for hook in hooks:
                hook.remove()
    rows = []
    for name, layer in layers.items():
        if isinstance(layer, Mamba):
            step, B, C = layer.x_proj.weight.split([layer.rank, layer.states, layer.states])
            rate, step = layer.A_log, layer.dt_proj.weight @ step
        else:
            _, _, B, C, step = layer.inward.weight.split([layer.widths[0], *layer.widths, layer.heads])
            rate = layer.rate
        rows.append(
            {
                "layer": name,
                "abscissa": -float(rate.detach().exp().min()),
                **{k: float(torch.linalg.matrix_norm(w.detach(), 2)) for k, w in (("B", B), ("C", C), ("step", step))},
                "input": bounds.get(name),
            }
        )
    return rows
