"""Delta gradient descent: a layer's weights are a memory, and unlearn what they say before they learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.errors import CheckpointError
from remanence.optim.gradient_memory import SOURCE, check_rate


@card(
    "delta-gradient-descent",
    covers="nested-learning",
    kind="optimizer",
    says="Each linear layer regresses to the answer that its output's gradient asks for.",
    source=SOURCE,
    small={"lr": 0.1},
)
class DeltaGradientDescent:
    r"""Every linear layer solves $\arg\min_W \tfrac12 ‖Wx - u‖^2 + \tfrac{1}{2η}‖W - aW_t‖^2$ with $u = -∂L/∂y$.

    For a batch the squared error is the mean over its tokens. In closed form, with $G$ the weight's gradient and $A$
    the mean of $xx^\top$: $W ← (aW - ηG)(I + ηA)^{-1}$; for one token $W ← W - η'(Wx)x^\top - η'(∂L/∂y)x^\top$ with
    $η' = η/(1 + η‖x‖^2)$. With the dot product in the place of the squared error it is gradient descent. All other
    parameters descend their gradients.

    The rule decays weights along its inputs for as long as there are any: on $\tfrac12‖Wx - y‖^2$ it comes to rest at
    $Wx = y/2$. That is what the rule says, not a fault of the arithmetic.

    Args:
        model: the model; the inputs of its `nn.Linear` layers are watched while gradients are taken.
        lr: η > 0; schedules change `param_groups[0]["lr"]`.
        objective: `"squared"`, or `"dot"` −⟨Wx, u⟩.
        retain: a in (0, 1], of linear weights.
        reduction: how the loss joins tokens: `"mean"` or `"sum"`, which gives $A$ the same scale.

    Keeps one matrix of inputs × inputs per linear layer, from a backward pass to the step that uses it.
    Raises: `ValueError` for arguments out of range.
    Source: Nested Learning (2025), arXiv:2512.24695, for inputs of unit length; the closed form for others follows.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        objective: Literal["squared", "dot"] = "squared",
        retain: float = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
    ):
        check_rate("DeltaGradientDescent", lr=lr, retain=retain)
        for name, value, known in (
            ("objective", objective, ("squared", "dot")),
            ("reduction", reduction, ("mean", "sum")),
        ):
            if value not in known:
                raise ValueError(f"DeltaGradientDescent: {name} must be {' or '.join(known)}, got {value!r}.")
        if retain > 1:
            raise ValueError(f"DeltaGradientDescent: retain must lie in (0, 1], got {retain!r}.")
        self.objective, self.retain, self.reduction = objective, retain, reduction
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        given = [p for p in model.parameters() if p.requires_grad]
        self.param_groups: list[dict[str, Any]] = [{"params": given, "lr": lr}]
        self.gram = {
            layer.weight: layer.weight.new_zeros(layer.in_features, layer.in_features) for layer in self.layers
        }
        self.tokens = {layer.weight: 0 for layer in self.layers}
        self.hooks = (
            [layer.register_forward_hook(self._watch) for layer in self.layers] if objective == "squared" else []
        )

    def close(self) -> None:
        """Stop watching the model."""
        for hook in self.hooks:
            hook.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; the inputs that they came from are forgotten by `step`."""
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Solve every linear layer for its new weights; move everything else along its gradient."""
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None and p in self.gram:
                p.copy_(self._solved(p, p.grad, lr))
            elif p.grad is not None:
                p.sub_(p.grad, alpha=lr)
        for weight, gram in self.gram.items():
            gram.zero_()
            self.tokens[weight] = 0

    def state_dict(self) -> dict[str, Any]:
        """The rate, and what was seen of inputs since the last step."""
        held = {str(i): {"gram": A, "tokens": self.tokens[w]} for i, (w, A) in enumerate(self.gram.items())}
        return {"state": held, "lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises: `CheckpointError`, changing nothing, when it does not fit."""
        held = tree.get("state", {})
        if {i: t["gram"].shape for i, t in held.items()} != {str(i): A.shape for i, A in enumerate(self.gram.values())}:
            raise CheckpointError("The optimiser's state is of another model: its linear layers differ.")
        for i, (weight, gram) in enumerate(self.gram.items()):
            gram.copy_(held[str(i)]["gram"])
            self.tokens[weight] = held[str(i)]["tokens"]
        self.param_groups[0]["lr"] = tree["lr"]

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x, weight = inputs[0].detach(), layer.weight
        assert isinstance(weight, nn.Parameter)

        def gather(
            gradient: Tensor,
        ) -> None:  # runs only if a gradient comes back: what was merely looked at is not kept
            rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
            self.gram[weight].addmm_(rows.mT, rows)
            self.tokens[weight] += len(rows)

        output.register_hook(gather)

    def _solved(self, W: Tensor, gradient: Tensor, lr: float) -> Tensor:
        target = self.retain * W - lr * gradient
        if not self.tokens[W]:
            return target
        share = lr / self.tokens[W] if self.reduction == "mean" else lr
        system = self.gram[W] * share
        system.diagonal().add_(1)
        return torch.cholesky_solve(target.mT, torch.linalg.cholesky(system)).mT
