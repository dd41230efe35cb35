"""Just read twice: repeat what was asked about, or read the first part of a stream from both sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import merge, per_head, split, zeros
from remanence.ops import steps
from remanence.ops.recurrence_steps import taylor
from remanence.state import State

SOURCE = "arXiv:2407.05483"


@card(
    "jrt-prompt",
    kind="tool",
    covers="jrt",
    says="Repeats a prompt, so that a recurrent model reads the context knowing the question.",
    source=SOURCE,
)
def read_twice(*pieces: Tensor, times: int = 2) -> Tensor:
    """The pieces one after another, `times` over: context, question, context, question.

    At the second reading the model knows what is asked, and what else the context holds: what it must keep is no
    longer decided by the order.

    Shapes: each piece [batch, time, ...], tokens or embeddings; returns [batch, times · total time, ...].
    Raises: `ValueError` if nothing is given or `times` < 1.
    Source: Just read twice (2024), arXiv:2407.05483 (JRT-Prompt).
    """
    if not pieces or times < 1:
        raise ValueError(f"read_twice needs at least one piece and one reading, got {len(pieces)} and times={times}.")
    return torch.cat(pieces * times, dim=1)


def taylor_features(x: Tensor) -> Tensor:
    """φ with φ(q)·φ(k) = 1 + s + s²/2 for s = q·k/√d: [..., d] -> [..., 1 + d + d(d + 1)/2].

    The paper lists every product x_i x_j; here each pair stands once, weighted, for the same inner products.
    """
    d = x.shape[-1]
    x = x / d**0.25
    pairs = (x[..., apart:] * x[..., :-apart] for apart in range(1, d))
    return torch.cat([torch.ones_like(x[..., :1]), x, math.sqrt(0.5) * x * x, *pairs], dim=-1)


@card(
    "jrt",
    kind="memory",
    says="Linear attention whose first tokens are read from both sides: what comes first may be kept with foresight.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "features": 3, "prefix": 4},
    exempt={"resumption": "the prefix is read from both sides, so it must come in one piece; cuts after it are exact"},
    parents=("linear-attention",),
    change="the state starts with a non-causal sum over the prefix; second-order Taylor features",
)
class PrefixLinearAttention(Memory):
    r"""JRT-RNN: $y_i ∝ φ(q_i)^\top [\sum_{j ≤ i} φ(k_j) v_j^\top + \sum_{j ≤ M} φ(k^e_j) {v^e_j}^\top]$.

    It is divided by the same with 1 for each value; φ is the second-order Taylor map of exp (`taylor_features`). The
    prefix, the first M tokens of a stream or what comes of them with its first piece, has keys $k^e$ and values $v^e$
    of its own, and is seen by every token, also those before. So outputs within it know what follows: train there by
    filling in masked tokens (`mask_prefix`, `prefix_loss`), and score what comes after. After the prefix the layer is
    plain linear attention.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories.
        features: of queries and keys, before φ.
        prefix: M, the tokens read from both sides.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, F, dim/heads + 1], "begun": bool [batch]} with
        F = 1 + features + features·(features + 1)/2, and whether the prefix has been read.
    Raises: `ValueError` if `heads` does not divide `dim` or `prefix` < 0; `ShapeError`, `StateError` from `forward`.
    Source: Just read twice (2024), arXiv:2407.05483.
    """

    def __init__(self, dim: int, *, heads: int = 4, features: int = 16, prefix: int = 1024):
        super().__init__()
        if prefix < 0 or features < 1:
            given = f"prefix={prefix}, features={features}"
            raise ValueError(f"PrefixLinearAttention: prefix must be at least 0 and features 1, got {given}.")
        self.dim, self.heads, self.features, self.prefix = dim, heads, features, prefix
        self.head_dim = per_head("PrefixLinearAttention", dim, heads)
        self.qk = Linear(dim, 2 * heads * features, bias=False)
        self.prefix_k = Linear(dim, heads * features, bias=False)
        self.v, self.prefix_v = (Linear(dim, dim, bias=False) for _ in range(2))
        self.out = Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        width = 1 + self.features + self.features * (self.features + 1) // 2
        S = zeros(self.out.weight, batch, self.heads, width, self.head_dim + 1)
        return {"S": S, "begun": S.new_zeros(batch, dtype=torch.bool)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        S = state["S"]
        begun = bool(state["begun"].all())
        if begun and x.shape[1] == 1 and steps.worth(S, x):
            y, S = taylor(self.qk(x), self.v(x), S)
            return self.out(y), {"S": S, "begun": state["begun"]}
        if not begun:
            head = x[:, : self.prefix]
            read = taylor_features(split(self.prefix_k(head), self.heads)).mT @ self._values(self.prefix_v(head))
            S = S + torch.where(state["begun"][:, None, None, None], 0.0, read)
        q, k = taylor_features(split(self.qk(x), 2 * self.heads)).chunk(2, dim=1)
        y, after = ops.linear_attention(q, k, self._values(self.v(x)), state={"S": S})
        mean = y[..., :-1] / (y[..., -1:] + 1e-12)
        return self.out(merge(mean).to(x.dtype)), {**after, "begun": state["begun"] | (x.shape[1] > 0)}

    def _values(self, v: Tensor) -> Tensor:
        v = split(v, self.heads)
        return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def mask_prefix(
    tokens: Tensor, prefix: int, mask_token: int, generator: torch.Generator, *, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hide a share of the prefix: the tokens with `mask_token` in their place, and where (bool), both [batch, time]."""
    hidden = torch.rand(tokens.shape, generator=generator, device=generator.device).to(tokens.device) < share
    hidden[:, prefix:] = False
    return tokens.masked_fill(hidden, mask_token), hidden


def prefix_loss(logits: Tensor, tokens: Tensor, hidden: Tensor, prefix: int, *, weight: float = 0.25) -> Tensor:
    """Next-token loss after the prefix, plus `weight` times that of the hidden tokens in it (scalar, nats).

    Within the prefix the logits at a place are for the token at that place; after it, for the one that follows.
    Shapes: logits [batch, time, vocabulary] of the masked tokens, tokens (as they were) and hidden [batch, time].
    """
    after = F.cross_entropy(logits[:, prefix:-1].flatten(0, 1), tokens[:, prefix + 1 :].flatten())
    if not hidden.any():
        return after
    return after + weight * F.cross_entropy(logits[hidden], tokens[hidden])
