"""VSSM: a variational autoencoder of sequences that generates all steps at once, and goes on where it stopped."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import expect, unknown
from remanence.memory import make
from remanence.models.language import Block
from remanence.state import State, check_state

LIKELIHOODS = ("gaussian", "bernoulli")


def keyed_normal(seed: Tensor, position: Tensor, steps: int, width: int) -> Tensor:
    """Standard normal numbers that depend on nothing but the seed of the row, the position and the feature.

    So a stream drawn in pieces is the stream drawn at once, and rows may be selected and joined.
    Shapes: seed and position int64 [B] -> [B, steps, width], float64.
    Source: SplitMix64, Steele et al., Fast Splittable Pseudorandom Number Generators (2014); Box–Muller.
    """
    step = torch.arange(steps, device=seed.device)[:, None] * width + torch.arange(width, device=seed.device)
    bits = _mixed(_mixed(seed)[:, None, None] + position[:, None, None] * width + step)
    radius, angle = ((b >> 11 & (1 << 53) - 1).double() * 2.0**-53 for b in (bits, _mixed(bits)))
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)


def _mixed(x: Tensor) -> Tensor:
    """The output function of SplitMix64; int64 wraps around as it needs."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


class Stack(nn.Module):
    """Memories between two linear maps. Shapes: x [batch, time, inputs] -> [batch, time, outputs]; state {"0": ...}."""

    def __init__(self, inputs: int, outputs: int, hidden: int, layers: int, memory: str, arguments: dict[str, Any]):
        super().__init__()
        self.inward, self.out = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.blocks = nn.ModuleList([Block(make(memory, hidden, **arguments), 2 * hidden) for _ in range(layers)])

    def initial_state(self, batch: int) -> State:
        return {str(i): block.memory.initial_state(batch) for i, block in enumerate(self.blocks)}  # type: ignore

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state, after = self.initial_state(x.shape[0]) if state is None else state, {}
        y = self.inward(x)
        for i, block in enumerate(self.blocks):
            y, after[str(i)] = block(y, state[str(i)])
        return self.out(y), after


@card(
    "vssm",
    kind="tool",
    says="A variational autoencoder of sequences over any memory: all steps are generated at once, and resumably.",
    source="arXiv:2407.08415",
)
class VSSM(nn.Module):
    r"""Latents $z_t$ for all steps are drawn at once; $p(x_t | z_{≤t})$ is a causal stack of memories over them.

    The posterior $q(z_t | x)$ is read off a stack in each direction; the prior $p(z_t | x_{≤\min(t, c)})$ off a causal
    stack that sees the first c items and blanks after. Trained with c drawn at random, it continues any prefix. All
    three are Gaussian and independent over steps; at the start the prior is N(0, I).

    Args:
        dim: features of the data.
        latent: features of z.
        hidden, layers: of each of the four stacks.
        memory: the name of a memory, built with `arguments`.
        likelihood: `gaussian`, with a learned scale per feature, or `bernoulli`.

    Shapes: x [batch, time, dim], z [batch, time, latent]; the state of a generation is {"prior": ..., "decoder": ...,
        "position": int64 [batch], "seed": int64 [batch]}.
    Raises: `UnknownName` for a memory or likelihood; `ShapeError`; `StateError` for a state of another model.
    Source: Variational State Space Models (2024), arXiv:2407.08415; the paper gives no code: distributions, depths and
        the stacks' form are choices made here.
    """

    def __init__(
        self,
        dim: int,
        *,
        latent: int = 16,
        hidden: int = 64,
        layers: int = 2,
        memory: str = "griffin",
        likelihood: str = "gaussian",
        arguments: dict[str, Any] | None = None,
    ):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise unknown("likelihood", likelihood, LIKELIHOODS)
        self.dim, self.latent, self.likelihood = dim, latent, likelihood
        rest = (hidden, layers, memory, arguments or {})
        self.forwards, self.backwards = (Stack(dim, 2 * latent, *rest) for _ in range(2))
        self.prior = Stack(dim + 1, 2 * latent, *rest)
        self.decoder = Stack(latent, dim, *rest)
        self.log_scale = nn.Parameter(torch.zeros(dim))
        nn.init.zeros_(self.prior.out.weight)
        nn.init.zeros_(self.prior.out.bias)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z_t | x), each [batch, time, latent]."""
        both = self.forwards(x)[0] + self.backwards(x.flip(1))[0].flip(1)
        mean, log_std = both.chunk(2, -1)
        return mean, log_std

    def expect_latents(self, x: Tensor, seen: Tensor, state: State | None = None) -> tuple[Tensor, Tensor, State]:
        """Mean and log standard deviation of p(z_t | the x seen until t), and the prior's state.

        Shapes: x [batch, time, dim]; seen bool [batch, time], what is not seen is blank.
        """
        flag = seen[..., None].to(x.dtype)
        both, state = self.prior(torch.cat([x * flag, flag], -1), state)
        mean, log_std = both.chunk(2, -1)
        return mean, log_std, state

    def decode(self, z: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The mean of p(x_t | z_{≤t}) (of the logits, for `bernoulli`) and the decoder's state."""
        return self.decoder(z, state)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) in nats: [batch]."""
        mean, _ = self.decode(z)
        if self.likelihood == "bernoulli":
            return -F.binary_cross_entropy_with_logits(mean, x, reduction="none").sum((1, 2))
        far = (x - mean) * (-self.log_scale).exp()
        return -(far.square() / 2 + self.log_scale + math.log(2 * math.pi) / 2).sum((1, 2))

    def divergence(self, x: Tensor, observed: Tensor, free: float = 0.0) -> Tensor:
        """KL(q(z | x) ‖ p(z | the first `observed` items)) in nats: [batch]; each step counts `free` nats at least."""
        seen = torch.arange(x.shape[1], device=x.device) < observed[:, None]
        mean, log_std = self.encode(x)
        prior_mean, prior_log_std, _ = self.expect_latents(x, seen)
        ratio = (2 * (log_std - prior_log_std)).exp()
        far = (mean - prior_mean).square() * (-2 * prior_log_std).exp()
        return ((ratio + far - 1) / 2 + prior_log_std - log_std).sum(-1).clamp(min=free).sum(1)

    def elbo(
        self,
        x: Tensor,
        observed: Tensor | None = None,
        *,
        beta: float = 1.0,
        free: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A bound on log p(x | its first `observed` items) in nats, from one draw of z: [batch].

        Args:
            observed: int64 [batch], the prefix given to the prior; none of it by default.
            beta: weight of the divergence (raise it from 0 against posterior collapse).
            free: nats per step that the divergence may cost for nothing.
            generator: what z is drawn from.
        """
        expect("VSSM", "x", x, "batch time dim", dim=self.dim)
        if observed is None:
            observed = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        mean, log_std = self.encode(x)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return self.log_likelihood(x, mean + log_std.exp() * noise) - beta * self.divergence(x, observed, free)

    def initial_state(self, seeds: Tensor) -> State:
        """The state before anything was generated or observed; one seed (int64) for each row."""
        B = len(seeds)
        parts = {"prior": self.prior.initial_state(B), "decoder": self.decoder.initial_state(B)}
        return {**parts, "position": torch.zeros_like(seeds), "seed": seeds}

    def observe(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Read a prefix: what the model makes of it [batch, time, dim], and the state from which it is continued."""
        expect("VSSM", "x", x, "batch time dim", dim=self.dim)
        return self._advance(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), state)

    def generate(self, steps: int, state: State) -> tuple[Tensor, State]:
        """The next `steps` items in one pass, parallel in time: their means [batch, steps, dim], and the state then.

        In pieces or at once, the items are the same.
        """
        if steps < 0:
            raise ValueError(f"VSSM: steps must be at least 0, got {steps}.")
        blank = self.log_scale.new_zeros(len(state["seed"]), steps, self.dim)
        return self._advance(blank, torch.zeros_like(blank[..., 0], dtype=torch.bool), state)

    def _advance(self, x: Tensor, seen: Tensor, state: State) -> tuple[Tensor, State]:
        check_state("VSSM", state, self.initial_state(state["seed"]))
        mean, log_std, prior = self.expect_latents(x, seen, state["prior"])
        noise = keyed_normal(state["seed"], state["position"], x.shape[1], self.latent).to(mean)
        out, decoder = self.decode(mean + log_std.exp() * noise, state["decoder"])
        after = {"prior": prior, "decoder": decoder, "position": state["position"] + x.shape[1], "seed": state["seed"]}
        return out.sigmoid() if self.likelihood == "bernoulli" else out, after
