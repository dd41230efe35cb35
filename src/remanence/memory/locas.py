"""Locas: a small network beside each feed-forward network of a frozen model, made from it, and taught by the stream."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.errors import unknown
from remanence.state import State, detach

INITS = ("top", "random", "gaussian")
VARIANTS = ("glu", "mlp")


def glu(module: nn.Module) -> tuple[Tensor, Tensor, nn.Linear] | None:
    """Gate rows [m, d], value rows [m, d] and the way down (d, m) of W_o(SiLU(W_g x) ⊙ W_i x); None for other modules.

    It knows the two forms in use: `inner` (both, gate first) and `out`; or `gate_proj`, `up_proj` and `down_proj`.
    """
    parts = {name: m for name, m in module.named_children() if isinstance(m, nn.Linear)}
    if parts.keys() == {"inner", "out"} and parts["inner"].out_features == 2 * parts["out"].in_features:
        gate, value = parts["inner"].weight.chunk(2)
        return gate, value, parts["out"]
    if parts.keys() == {"gate_proj", "up_proj", "down_proj"}:
        return parts["gate_proj"].weight, parts["up_proj"].weight, parts["down_proj"]
    return None


class Sideway(nn.Module):
    """FFN(A) + τ · mem(A), with slots as rows: mem(A) = (SiLU(A Gᵀ) ⊙ A Kᵀ) V, or ReLU(A Kᵀ) V where there is no G.

    Shapes: A and the result [..., dim]; K, G, V [slots, dim].
    """

    def __init__(self, ffn: nn.Module, key: Tensor, value: Tensor, gate: Tensor | None, tau: float):
        super().__init__()
        self.ffn, self.tau = ffn, tau
        self.key, self.value = nn.Parameter(key), nn.Parameter(value)
        self.gate = None if gate is None else nn.Parameter(gate)
        self.seen: list[tuple[Tensor, Tensor]] | None = None

    def recall(self, A: Tensor) -> Tensor:
        """mem(A)."""
        read = A @ self.key.mT
        return (F.relu(read) if self.gate is None else F.silu(A @ self.gate.mT) * read) @ self.value

    def forward(self, A: Tensor) -> Tensor:
        out = self.ffn(A) + self.tau * self.recall(A)
        if self.seen is not None:
            self.seen.append((A, out))
        return out


@card(
    "locas",
    kind="tool",
    says="Gives every feed-forward network of a frozen model a few slots beside it that learn from the stream.",
    source="arXiv:2602.05085",
)
class Locas:
    r"""Side memories for the gated feed-forward networks of a model, which itself stays as it is.

    "glu": r slots with the model's own form. Their rows are the r units of the network that are most active on a first
    chunk, scaled to length 1, and what they say begins at zero, so that nothing changes until they learn: by Adam on
    the loss of each chunk, after it was scored. "mlp": ReLU slots, one written per token without an optimiser: under
    the key A/‖A‖ the direction in which log p of that token rises, ε long over all layers. After each step each
    slot's vectors are cut to length 1.

    Args:
        model: `model(tokens, state) -> (logits, state)` with `initial_state` and `vocabulary`, as `LanguageModel` has.
            Its networks are those that `glu` knows. It is changed in place until `detach` or `merge`.
        sample: the first chunk, int64 [rows, time], for "top"; it is read, not learnt.
        slots: r per network for "glu", 16 to 128 in the paper; "mlp" begins with none.
        variant: "glu" or "mlp".
        init: "top", "random" (units drawn from the network) or "gaussian" (not from the model at all).
        lr: of Adam. epsilon: ε of "mlp". seed: of "random" and "gaussian".

    A stream's state is {"model": that of the model, "last": int64 [rows]}, the latest token of each row. All rows
    share the slots.
    Raises: `UnknownName` for a variant or init that there is not; `ValueError` for a model without such networks, more
        slots than units, or numbers out of range.
    Source: Locas: Your Models are Principled Initializers of Locally-Supported Parametric Memories (2026),
        arXiv:2602.05085, whose code is not published.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Tensor | None = None,
        *,
        slots: int = 64,
        variant: str = "glu",
        init: str = "top",
        lr: float = 4e-3,
        epsilon: float = 0.01,
        seed: int = 0,
    ):
        for what, given, known in (("variant", variant, VARIANTS), ("init", init, INITS)):
            if given not in known:
                raise unknown(f"{what} of Locas", given, known)
        places = [(parent, name) for parent in model.modules() for name, m in parent.named_children() if glu(m)]
        if not places:
            raise ValueError("Locas: the model has no gated feed-forward network of a known form to stand beside.")
        units = min(parts[0].shape[0] for p, n in places if (parts := glu(getattr(p, n))))
        if (variant == "glu" and not 1 <= slots <= units) or not lr > 0 or not epsilon > 0:
            given = f"slots={slots}, lr={lr}, epsilon={epsilon}"
            raise ValueError(f"Locas: slots must be from 1 to {units}, lr and epsilon > 0, got {given}.")
        if variant == "glu" and init == "top" and sample is None:
            raise ValueError("Locas: init='top' needs a sample, int64 [rows, time]; or take init='random'.")
        self.model, self.variant, self.epsilon, self.places = model, variant, epsilon, places
        self.sides: list[Sideway] = []
        source = torch.Generator().manual_seed(seed)
        for parent, name in places:
            ffn = getattr(parent, name)
            self.sides.append(self._beside(ffn, 0 if variant == "mlp" else slots))
            setattr(parent, name, self.sides[-1])
        if variant == "glu":
            self._fill(sample, init, slots, source)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr) if variant == "glu" else None

    def _beside(self, ffn: nn.Module, slots: int) -> Sideway:
        parts = glu(ffn)
        assert parts is not None
        weight = parts[2].weight.detach()  # [d, m]: the m units are its columns
        nothing = weight.new_zeros(slots, weight.shape[0])
        if self.variant == "mlp":
            return Sideway(ffn, nothing, nothing.clone(), None, 1.0)
        return Sideway(ffn, nothing, nothing.clone(), nothing.clone(), float(weight.norm(dim=0).mean()) / slots)

    @torch.no_grad()
    def _fill(self, sample: Tensor | None, init: str, slots: int, source: torch.Generator) -> None:
        inputs: list[Tensor] = []
        if init == "top":
            assert sample is not None
            state = self.initial_state(len(sample))
            inputs = [seen[0][0] for seen in self._watching(self._shifted(sample, state), state["model"])[1]]
        for i, side in enumerate(self.sides):
            parts = glu(side.ffn)
            assert parts is not None
            gate, value, _ = parts
            if init == "gaussian":
                rows = [torch.randn(slots, gate.shape[1], generator=source).to(gate) for _ in range(2)]
            else:
                score = torch.rand(len(gate), generator=source).to(gate)
                if init == "top":
                    A = inputs[i].flatten(0, -2)
                    score = (F.silu(A @ gate.mT) * (A @ value.mT)).abs().mean(0)
                chosen = score.topk(slots).indices
                rows = [gate[chosen], value[chosen]]
            assert side.gate is not None
            side.gate.copy_(F.normalize(rows[0], dim=-1))
            side.key.copy_(F.normalize(rows[1], dim=-1))

    def parameters(self) -> list[nn.Parameter]:
        """What the stream teaches."""
        return [p for side in self.sides for p in (side.key, side.value, side.gate) if p is not None]

    def nbytes(self) -> int:
        """Bytes that the slots hold, with Adam's two moments where there is an optimiser."""
        held = sum(p.numel() * p.element_size() for p in self.parameters())
        return held * (3 if self.optimizer is not None else 1)

    def initial_state(self, rows: int) -> State:
        """Before the first token."""
        first = getattr(self.model, "beginning", self.model.vocabulary)
        device = next(self.model.parameters()).device
        last = torch.full((rows,), int(first), dtype=torch.int64, device=device)  # type: ignore[arg-type]
        return {"model": self.model.initial_state(rows), "last": last}  # type: ignore[operator]

    def read(self, tokens: Tensor, state: State | None = None, *, learn: bool = True) -> tuple[Tensor, State]:
        """Score a chunk, then learn it. tokens int64 [rows, time] -> loss in nats [rows, time], and the state."""
        state = self.initial_state(len(tokens)) if state is None else state
        if learn and self.optimizer is None:
            return self._write(tokens, state)
        with torch.set_grad_enabled(learn):
            logits, after = self.model(self._shifted(tokens, state), state["model"])
            loss = F.cross_entropy(logits.transpose(1, 2).float(), tokens, reduction="none")
        if learn and self.optimizer is not None and tokens.numel():
            grads = torch.autograd.grad(loss.mean(), self.parameters())
            for p, g in zip(self.parameters(), grads, strict=True):
                p.grad = g
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._cut()
        return loss.detach(), {"model": detach(after), "last": self._last(tokens, state)}

    def _write(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One slot per token and row: each token is written before the next is scored."""
        losses = [tokens.new_zeros(len(tokens), 0, dtype=torch.float32)]
        for token in tokens.split(1, 1):
            with torch.enable_grad():
                (logits, after), seen = self._watching(self._shifted(token, state), state["model"])
                loss = F.cross_entropy(logits[:, 0].float(), token[:, 0], reduction="none")
                grads = torch.autograd.grad(-loss.sum(), [pairs[0][1] for pairs in seen])
            length = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0).clamp(min=1e-30)
            for side, pairs, g in zip(self.sides, seen, grads, strict=True):
                key, value = F.normalize(pairs[0][0][:, 0].detach(), dim=-1), self.epsilon * g[:, 0] / length[:, None]
                side.key = nn.Parameter(torch.cat([side.key.detach(), key]))
                side.value = nn.Parameter(torch.cat([side.value.detach(), value]))
            state = {"model": detach(after), "last": token[:, 0]}
            losses.append(loss.detach()[:, None])
        return torch.cat(losses, 1), state

    @torch.no_grad()
    def compress(self, slots: int) -> None:
        """As few "mlp" slots as say the most of what they said (NL-SVD): probes are the keys' principal directions.

        Raises: `ValueError` for fewer than one slot, or for "glu" slots, which do not grow.
        """
        if slots < 1 or self.variant == "glu":
            raise ValueError(
                f"Locas: compress needs 'mlp' slots and at least 1 to keep, got {self.variant!r}, {slots}."
            )
        for side in self.sides:
            K, V = side.key.float(), side.value.float()
            if len(K) <= slots:
                continue
            scaled = K * V.norm(dim=1, keepdim=True)
            probes = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors[:, -slots:].mT
            said = scaled @ probes.mT  # an eigenvector's sign is free, a ReLU's is not
            probes = probes * torch.where(F.relu(said).sum(0) >= F.relu(-said).sum(0), 1, -1)[:, None]
            side.value = nn.Parameter((F.relu(probes @ K.mT) @ V).to(side.value))
            side.key = nn.Parameter(probes.to(side.key))

    @torch.no_grad()
    def _cut(self) -> None:
        for p in self.parameters():
            p.div_(p.norm(dim=1, keepdim=True).clamp(min=1))

    def detach(self) -> None:
        """Take the slots off again: the model is what it was, bit for bit."""
        for (parent, name), side in zip(self.places, self.sides, strict=True):
            setattr(parent, name, side.ffn)

    @torch.no_grad()
    def merge(self) -> None:
        """Make the slots units of the networks themselves, τ in what they say; raises `ValueError` for "mlp"."""
        if self.variant == "mlp":
            raise ValueError("Locas: ReLU slots cannot become units of a gated network; detach them, or keep them.")
        for side in self.sides:
            parts = glu(side.ffn)
            assert parts is not None
            assert side.gate is not None
            gate, value, down = parts
            gate, value = torch.cat([gate, side.gate]), torch.cat([value, side.key])
            low = torch.cat([down.weight, side.tau * side.value.mT], 1)
            if hasattr(side.ffn, "inner"):
                wider = {"inner": torch.cat([gate, value]), "out": low}
            else:
                wider = {"gate_proj": gate, "up_proj": value, "down_proj": low}
            for name, W in wider.items():
                linear = getattr(side.ffn, name)
                linear.weight = nn.Parameter(W, requires_grad=linear.weight.requires_grad)
                linear.out_features, linear.in_features = W.shape
        self.detach()

    def _shifted(self, tokens: Tensor, state: State) -> Tensor:
        return torch.cat([state["last"][:, None], tokens[:, :-1]], 1)[:, : tokens.shape[1]]

    def _last(self, tokens: Tensor, state: State) -> Tensor:
        return tokens[:, -1] if tokens.shape[1] else state["last"]

    def _watching(self, tokens: Tensor, state: State) -> tuple[Any, list[list[tuple[Tensor, Tensor]]]]:
        """The model's answer, and what passed through each network."""
        for side in self.sides:
            side.seen = []
        try:
            answer = self.model(tokens, state)
            return answer, [side.seen or [] for side in self.sides]
        finally:
            for side in self.sides:
                side.seen = None
