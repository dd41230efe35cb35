"""The linear maps of layers: PyTorch's, by the product that is fastest here."""

from __future__ import annotations

from torch import Tensor, nn

from remanence import ops
from remanence.memory.bare import transparent


@transparent
class Linear(nn.Linear):
    """`torch.nn.Linear`, weights and all, through `ops.linear`.

    Shapes: x [..., in_features] -> [..., out_features].
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)
