"""Recoding: after each token one gradient step on the activations that are carried on, not on the weights."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import RemanenceError
from remanence.state import State, flatten, tree_map, unflatten

STEPS = {"surprisal": 0.05, "power": 5.0, "entropy": 0.001, "ensemble": 0.001}


class LSTMModel(nn.Module):
    """Tokens to logits through stacked LSTM cells (Hochreiter & Schmidhuber 1997), with their state.

    Args: `vocabulary` tokens, of which token `vocabulary` itself stands for the beginning; `dim` units in each of
    `layers`.
    Shapes: tokens int64 [batch, time] in [0, vocabulary]; logits [batch, time, vocabulary]; state {"h", "c": {"0":
    [batch, dim], ...}}.
    """

    def __init__(self, vocabulary: int, dim: int = 650, layers: int = 2):
        super().__init__()
        self.vocabulary, self.dim = vocabulary, dim
        self.embedding = nn.Embedding(vocabulary + 1, dim)
        self.cells = nn.ModuleList(nn.Linear(2 * dim, 4 * dim) for _ in range(layers))
        self.head = nn.Linear(dim, vocabulary)

    def initial_state(self, batch: int) -> State:
        """Nothing read yet."""
        blank = {str(i): self.head.weight.new_zeros(batch, self.dim) for i in range(len(self.cells))}
        return {"h": blank, "c": dict(blank)}

    def features(self, state: State) -> Tensor:
        """What the head decodes: the top layer's h, [batch, dim]."""
        return state["h"][str(len(self.cells) - 1)]

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(tokens.shape[0]) if state is None else state
        tops = []
        for x in self.embedding(tokens).unbind(1):
            h, c = {}, {}
            for i, cell in enumerate(self.cells):
                enter, keep, leave, content = cell(torch.cat([x, state["h"][str(i)]], -1)).chunk(4, -1)
                c[str(i)] = keep.sigmoid() * state["c"][str(i)] + enter.sigmoid() * content.tanh()
                x = h[str(i)] = leave.sigmoid() * c[str(i)].tanh()
            state = {"h": h, "c": c}
            tops.append(x)
        read = torch.stack(tops, 1) if tops else self.embedding(tokens)
        return self.head(read), state


class _Step(nn.Module):
    """The size of the correction, [batch, 1]: fixed, learned, or predicted from the features."""

    def __init__(self, given: float | str, dim: int, start: float):
        super().__init__()
        self.given = given
        if given == "learned":
            self.raw = nn.Parameter(torch.tensor(start).expm1().log())
        elif given == "predicted":
            self.net = nn.Sequential(
                nn.Linear(dim, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 1), nn.Softplus()
            )

    def forward(self, features: Tensor) -> Tensor:
        if self.given == "predicted":
            return self.net(features.detach())
        size = F.softplus(self.raw) if self.given == "learned" else features.new_tensor(float(self.given))
        return size.expand(len(features), 1)


@card(
    "recoding",
    kind="tool",
    says="Carries activations on after one gradient step against the surprise or doubt that they caused.",
    source="arXiv:2101.00674",
)
class Recoding(nn.Module):
    r"""A recurrent model whose state takes a step down an error, $h ← h - s\, ∂δ/∂h$, before it is carried on.

    | error | δ | when |
    |---|---|---|
    | surprisal | −log p of the token that came | as that token arrives: outputs are not decoded again |
    | power | $p^{-p} - 1$ of it | the same |
    | entropy | of the distribution averaged over fixed dropout masks | at once; outputs are decoded again |
    | ensemble | of the distribution averaged over several heads | the same |

    Every tensor of the state that the features were computed from is corrected, also in lower layers. The correction
    is a constant to outer gradients; the step is not. A documented near-negative result: errors at the corrected step
    fall, the stream's loss hardly changes.

    Args:
        model: `model(tokens, state) -> (logits, state)` with `initial_state`, `vocabulary`, `features(state)` and a
            `head` that turns features into logits; the state's tensors must be those that features are computed from
            (`LSTMModel`).
        error: δ, as above.
        step: s: a number, `"learned"`, or `"predicted"` from the features by a network; by default 0.05 for surprisal,
            5 for power and 0.001 for the others.
        samples: masks, or heads of the ensemble (which takes the place of the model's head).
        dropout: share of features that a mask leaves out.

    The state is the model's; where tokens are waited for, it is the one before the last token, and that token, so that
    the last step can be taken again with its gradients. Masks are drawn once, so that a run can be repeated.
    Raises: `ValueError` for an unknown error or step; `RemanenceError` if the logits do not depend on the state.
    Source: Recoding latent sentence representations (2019), arXiv:2101.00674.
    """

    def __init__(
        self,
        model: nn.Module,
        error: Literal["surprisal", "power", "entropy", "ensemble"] = "surprisal",
        *,
        step: float | Literal["learned", "predicted"] | None = None,
        samples: int = 10,
        dropout: float = 0.21,
    ):
        super().__init__()
        if error not in STEPS:
            raise ValueError(f"Recoding: error must be one of {', '.join(STEPS)}, got {error!r}.")
        if isinstance(step, str) and step not in ("learned", "predicted"):
            raise ValueError(f"Recoding: step must be a number, 'learned' or 'predicted', got {step!r}.")
        self.model, self.error, self.vocabulary = model, error, int(model.vocabulary)  # type: ignore[arg-type]
        self.waits = error in ("surprisal", "power")
        head = model.head
        assert isinstance(head, nn.Linear)
        self.size = _Step(STEPS[error] if step is None else step, head.in_features, STEPS[error])
        if error == "entropy":
            kept = torch.rand(samples, 1, head.in_features, generator=torch.Generator().manual_seed(0)) >= dropout
            self.register_buffer("masks", kept / (1 - dropout))
        if error == "ensemble":
            self.heads = nn.ModuleList(nn.Linear(head.in_features, head.out_features) for _ in range(samples))
            for i, member in enumerate(self.heads.parameters()):
                self.register_buffer(f"anchor{i}", member.detach().clone())

    def initial_state(self, batch: int) -> State:
        """Nothing read, nothing to correct."""
        state: State = {"model": self.model.initial_state(batch)}  # type: ignore[operator]
        if self.waits:
            device = next(self.model.parameters()).device
            state["token"] = torch.full((batch,), -1, device=device)
        return state

    def penalty(self, strength: float) -> Tensor:
        """strength/N · Σ‖W − anchor‖ over the heads: what keeps an ensemble's members apart; add it to the loss."""
        away = [(p - self.get_buffer(f"anchor{i}")).norm() for i, p in enumerate(self.heads.parameters())]
        return strength / len(self.heads) * torch.stack(away).sum()

    def decode(self, state: State) -> Tensor:
        """Logits [batch, vocabulary] from a state; of an ensemble, the logarithm of its mean distribution."""
        features = self.model.features(state)  # type: ignore[operator]
        if self.error == "ensemble":
            return _mean(torch.stack([head(features) for head in self.heads]))
        return self.model.head(features)  # type: ignore[operator]

    def doubt(self, state: State, target: Tensor | None = None) -> Tensor:
        """δ [batch] of a state; `target` int64 [batch] for the errors that wait, an unknown one counting as none."""
        if not self.waits:
            if self.error == "entropy":
                log_p = _mean(self.model.head(self.model.features(state) * self.get_buffer("masks")))  # type: ignore[operator]
            else:
                log_p = self.decode(state)
            return -(log_p.exp() * log_p).sum(-1)
        assert target is not None
        known = (target >= 0) & (target < self.vocabulary)
        log_p = self.decode(state).log_softmax(-1).gather(-1, target.where(known, 0)[:, None])[:, 0]
        return (-log_p if self.error == "surprisal" else torch.expm1(-log_p * log_p.exp())).where(known, 0.0)

    def recode(self, state: State, target: Tensor | None = None) -> State:
        """The state after its correction; it must come from a step that recorded gradients."""
        flat = flatten(state)
        delta = self.doubt(state, target).sum()
        found = torch.autograd.grad(delta, list(flat.values()), retain_graph=True, allow_unused=True)
        if all(g is None for g in found):
            raise RemanenceError("Recoding: the model's features are not computed from the state that it returns.")
        size = self.size(self.model.features(state))  # type: ignore[operator]
        after = {n: t if g is None else t - size * g for (n, t), g in zip(flat.items(), found, strict=True)}
        return unflatten(after)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(tokens.shape[0]) if state is None else state
        if not tokens.shape[1]:
            return self.model(tokens, state["model"])[0], state
        last, now, out = state.get("token"), state["model"], []
        with torch.enable_grad():
            if last is not None:
                before = now
                now = self._advance(last.clamp(min=0), before)
            for token in tokens.unbind(1):
                if last is not None:
                    read = (last >= 0)[:, None]
                    corrected = self.recode(now, token.where(last >= 0, -1))
                    now = before = tree_map(lambda a, b, read=read: torch.where(read, a, b), corrected, before)
                    last = token
                now = self._advance(token, now)
                if last is None:
                    now = self.recode(now)
                out.append(self.decode(now))
        after: State = (
            {"model": now}
            if last is None
            else {"model": before, "token": last.clone(memory_format=torch.contiguous_format)}
        )
        logits = torch.stack(out, 1)
        if torch.is_grad_enabled():
            return logits, after
        return logits.detach(), tree_map(Tensor.detach, after)

    def _advance(self, token: Tensor, state: State) -> State:
        """One step with gradients recorded, also where no parameter has any."""
        state = tree_map(lambda t: t if t.requires_grad else t.detach().requires_grad_(), state)
        return self.model(token[:, None], state)[1]


def _mean(logits: Tensor) -> Tensor:
    """The logarithm of the mean over the first axis of distributions."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
