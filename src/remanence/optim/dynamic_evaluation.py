"""Dynamic evaluation: a trained model goes on learning from what it has just scored, on a leash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.errors import CheckpointError, ShapeError
from remanence.state import detach


@card(
    "dynamic-evaluation",
    kind="optimizer",
    says="Steps by each weight's usual gradient in training, and is pulled back to the trained weights.",
    source="arXiv:1709.07432",
)
class DynamicEvaluation:
    r"""The update of dynamic evaluation (Krause et al. 2017, arXiv:1709.07432), RMS with global prior.

    $θ ← θ + \min(λR, 1) (θ_0 − θ) − η g / (M + ε)$, with $M$ the root mean square of the gradients in training,
    $θ_0$ the weights at construction, and $R = M / \bar M$, where $\bar M$ is the mean over tensors of their means
    of $M$: weights that training gradients move most are also pulled back most.

    It serves a model that is deployed: let `remanence.learning.Learner` read short segments with it, as in
    `Learner(model.eval(), DynamicEvaluation(...), clip=math.inf)`. A cut gradient is no longer on the scale of `M`.

    Args:
        parameters: what to update, those that require gradients; their present values are $θ_0$.
        mean_square: $M$ for each of them, in the same order, as `gather_mean_square` gives it.
        lr: η > 0, for segments of 5 tokens; in proportion for others. Schedules change `param_groups[0]["lr"]`.
        pull: λ ≥ 0, also in proportion to the length; 0 never returns.
        eps: ε > 0. A weight that no training gradient reached moves by `lr / eps` times its gradient, unpulled.

    Holds two further copies of the weights: $θ_0$ and $M$.
    Raises: `ValueError` for numbers out of range, and for a `mean_square` that is negative, not finite or zero
    throughout; `ShapeError` where it does not fit the parameters.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        mean_square: Iterable[Tensor],
        *,
        lr: float = 5e-5,
        pull: float = 0.002,
        eps: float = 2e-5,
    ):
        for name, value in {"lr": lr, "eps": eps}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"DynamicEvaluation: {name} must be > 0 and finite, got {value!r}.")
        if not 0 <= pull < float("inf"):
            raise ValueError(f"DynamicEvaluation: pull must be >= 0 and finite, got {pull!r}.")
        given = [p for p in parameters if p.requires_grad]
        kept = [m.detach().clone() for m in mean_square]
        shapes, want = [tuple(m.shape) for m in kept], [tuple(p.shape) for p in given]
        if shapes != want:
            at = next((i for i, (a, b) in enumerate(zip(shapes, want, strict=False)) if a != b), None)
            odd = f"{len(kept)} tensors for {len(given)}" if at is None else f"{shapes[at]} for {want[at]} at {at}"
            raise ShapeError(f"DynamicEvaluation: mean_square must have the shapes of the parameters, got {odd}.")
        if not all(torch.isfinite(m).all() and (m >= 0).all() for m in kept) or not any(m.any() for m in kept):
            raise ValueError("DynamicEvaluation: mean_square must be finite, >= 0, and somewhere > 0.")
        self.pull, self.eps = pull, eps
        self.param_groups: list[dict[str, Any]] = [{"params": given, "lr": lr}]
        self.trained = [p.detach().clone() for p in given]
        self.mean_square = kept

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Pull every parameter back a little, and update those that have a gradient."""
        group = self.param_groups[0]
        average = sum(float(m.mean()) for m in self.mean_square if m.numel()) / sum(
            m.numel() > 0 for m in self.mean_square
        )
        for p, start, m in zip(group["params"], self.trained, self.mean_square, strict=True):
            # the pull is from where the gradient was taken, so both terms are found before either is added
            change = (m * (self.pull / average)).clamp_(max=1).mul_(start - p)
            if p.grad is not None:
                change.addcdiv_(p.grad, m + self.eps, value=-group["lr"])
            p.add_(change)

    def state_dict(self) -> dict[str, Any]:
        """The trained weights, the statistics and the rate, in the order of the parameters."""
        tensors = {"trained": self.trained, "mean_square": self.mean_square}
        held = {name: {str(i): t.clone() for i, t in enumerate(ts)} for name, ts in tensors.items()}
        return {"state": held, "lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises: `CheckpointError`, changing nothing, when it does not fit."""
        pairs: list[tuple[Tensor, Tensor]] = []
        held = tree.get("state", {})
        for name, own in {"trained": self.trained, "mean_square": self.mean_square}.items():
            theirs = held.get(name, {})
            for i, tensor in enumerate(own):
                if len(theirs) != len(own) or str(i) not in theirs or theirs[str(i)].shape != tensor.shape:
                    raise CheckpointError(f"The optimiser's state is of another model: tensor {i} ({name!r}) differs.")
                pairs.append((tensor, theirs[str(i)]))
        for tensor, value in pairs:
            tensor.copy_(value)
        self.param_groups[0]["lr"] = tree["lr"]


def gather_mean_square(model: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """The root mean square of the gradients over training segments, with the state carried along.

    It is √mean(g²) for each parameter that requires gradients, in the order of `model.parameters()`, where g is the
    gradient of a segment's mean loss in nats, for the model in evaluation mode. Take segments of the length and
    the number of rows that the deployed model reads: gradients averaged over many rows are smaller.

    `model(tokens, state) -> (logits, state)` has `initial_state` and `vocabulary`, as `LanguageModel` has; it is left
    as it was, `.grad` included. Shapes: each batch int64 [rows, time], time ≥ 1, goes on where the one before ended.
    Raises: `ValueError` when there is no batch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in parameters]
    count, training = 0, model.training
    model.eval()
    try:
        for tokens in batches:
            if not count:
                first = getattr(model, "beginning", model.vocabulary)
                last = torch.full_like(tokens[:, :1], int(first))  # type: ignore[arg-type]
                state = model.initial_state(tokens.shape[0])  # type: ignore[operator]
            logits, state = model(torch.cat([last, tokens[:, :-1]], dim=1), state)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
            state, last, count = detach(state), tokens[:, -1:], count + 1
    finally:
        model.train(training)
    if not count:
        raise ValueError("gather_mean_square: it needs at least one batch, got none.")
    return [total.div_(count).sqrt_() for total in sums]
