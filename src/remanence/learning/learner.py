"""The learner: it predicts each item, is scored on it, and only then learns from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.continual.base import Batch, Context, Strategies, Strategy
from remanence.errors import CheckpointError, RemanenceError
from remanence.learning import checkpoint
from remanence.models.counting import CountingModel
from remanence.optim.adamw import AdamW
from remanence.state import State, concat, detach, fork, nbytes

OFFERED = frozenset({"task_id_train", "boundaries"})
"""What a stream can meet of `Strategy.needs`: domains have names, and their ends are told."""

STATE = {"model", "optimizer", "strategies", "guards", "counts", "state", "last", "step", "generator"}


class Optimizer(Protocol):
    """What the learner asks of an optimiser: PyTorch's have it, and those of `remanence.optim`."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, tree: Any, /) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What one observation cost.

    `bits` [rows, ...]: the surprise of each target of the stream's own rows, in bits, before it was learned.
    `loss`: the whole training loss in nats, with replayed rows and the strategies' terms.
    """

    bits: Tensor
    loss: float


class Learner:
    """Learns from a stream: predict, score, then learn, with the model's state carried along.

    Args:
        model: `model(inputs, state) -> (logits, state)` with `initial_state` for sequence models
            (`LanguageModel`), or any classifier `model(inputs) -> logits`.
        optimizer: over the model's parameters; `AdamW` by default.
        strategies: what guards against forgetting, in order.
        counts: a `CountingModel` that learns beside the network (one row of bytes only). It takes the
            network's prediction in and mixes it with its own; its prediction is then the one that is scored.
        schedule: step -> multiplier of the optimiser's learning rates; constant by default.
        clip: the gradient's norm is cut to this.
        learning: False reads with frozen weights: only states move.

    Raises: `RemanenceError` for a strategy that needs what a stream cannot give.

    A network that is small learns a segment while the counts read it: both use the forecast made before.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        strategies: Iterable[Strategy] = (),
        *,
        counts: CountingModel | None = None,
        schedule: Callable[[int], float] | None = None,
        clip: float = 1.0,
        learning: bool = True,
    ):
        self.model, self.counts, self.clip, self.learning = model, counts, clip, learning
        self.strategies = Strategies(strategies)
        if unmet := self.strategies.needs - OFFERED:
            wanting = next(s for s in self.strategies.members if s.needs & unmet)
            raise RemanenceError(
                f"{type(wanting).__name__} needs {', '.join(sorted(wanting.needs & unmet))}, "
                f"but a stream offers only {', '.join(sorted(OFFERED))}."
            )
        self.strategies.attach(model)
        self.optimizer: Optimizer = optimizer or AdamW(model.parameters())
        self.schedule = schedule
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        self.state: State | None = None
        self.last: Tensor | None = None
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="counts")

    @property
    def recurrent(self) -> bool:
        """Whether the model carries a state."""
        return hasattr(self.model, "initial_state")

    def observe(self, batch: Tensor | Batch, task: str | int | None = None) -> Outcome:
        """Predict the batch, score it, then learn from it.

        `batch` is a segment of tokens [rows, time] that continues each row's stream, or a `Batch`.
        Raises: `RemanenceError` when loss or gradient stop being finite; the weights stay as they were.
        """
        if isinstance(batch, Tensor):
            batch = self._shifted(batch, task)
        if not self.learning:
            with torch.no_grad():
                outputs, self.state = self._forward(batch)
            return Outcome(self._score(batch, outputs).result(), math.nan)
        rows = self.strategies.collect(batch)
        outputs, state = self._forward(rows)
        loss = _surprise(outputs, rows.targets).mean()
        extra = self.strategies.loss(Context(self.model, rows, outputs, loss))
        if extra is not None:
            loss = loss + extra
        self._finite("loss", loss)
        scored = self._score(batch, outputs.detach()[: batch.fresh])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._step()
        self.state = state
        return Outcome(scored.result(), loss.item())

    def boundary(self, task: str | int | None = None) -> None:
        """Tell the strategies that the task or domain called `task` has ended."""
        if self.learning:
            self.strategies.on_boundary(task)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, segment: int = 64) -> float:
        """Bits per token of a text [1, time] on frozen weights, from an empty state; disturbs nothing."""
        held = self.state, self.last, self.learning
        position = self.counts.position() if self.counts else {}
        if self.counts:
            self.counts.reset_position()
        self.state, self.last, self.learning = None, None, False
        try:
            pieces = [self.observe(piece).bits for piece in tokens.split(segment, dim=1)]
        finally:
            self.state, self.last, self.learning = held
            if self.counts:
                self.counts.set_position(position)
        return torch.cat(pieces, dim=1).mean().item()

    @torch.no_grad()
    def generate(
        self, prompt: bytes = b"", tokens: int = 200, *, temperature: float = 1.0, seed: int = 0
    ) -> Iterator[int]:
        """Continue from the present state, after `prompt`: one token at a time. The learner is left as it was.

        `temperature` ≥ 0 sharpens (< 1) or flattens (> 1) the choice; 0 takes the likeliest token.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}.")
        generator = np.random.default_rng(seed)
        position = self.counts.position() if self.counts else {}
        # a one-row stream whose last token has not been read by the network yet
        state = fork(self.state) if self.state is not None else self.model.initial_state(1)  # type: ignore[operator]
        last = self.last if self.last is not None else self._beginning(1)
        try:
            for at in range(len(prompt) + tokens):
                logits, state = self.model(last, state)
                log_probs = F.log_softmax(logits[0, -1].float(), -1)
                if at < len(prompt):
                    token = prompt[at]
                else:
                    token = _sample(self._next(log_probs), temperature, generator)
                if self.counts:
                    self.counts.observe(np.array([token], np.uint8), log_probs[None].numpy(), learn=False)
                last = torch.tensor([[token]])
                if at >= len(prompt):
                    yield token
        finally:
            if self.counts:
                self.counts.set_position(position)

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent state."""
        return nbytes(self.state) if self.state is not None else 0

    @property
    def kept_bytes(self) -> int:
        """Bytes kept of the past beside the network's weights: the strategies' buffers and the counts."""
        return self.strategies.state_bytes() + (self.counts.nbytes() if self.counts else 0)

    @property
    def parameters(self) -> int:
        """Number of learned weights of the network."""
        return sum(p.numel() for p in self.model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the future depends on, as nested dicts of tensors, arrays and plain values.

        As with PyTorch's modules these are the live tensors, not copies.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "strategies": self.strategies.state_dict(),
            "guards": self._guards,
            "counts": self.counts.arrays() if self.counts else None,
            "state": self.state,
            "last": self.last,
            "step": self.step,
            "generator": torch.get_rng_state(),
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; nothing is changed when it does not fit.

        Raises: `CheckpointError` that names the missing or extra tensors.
        """
        if missing := STATE - tree.keys():
            raise CheckpointError(f"The checkpoint is not one of a learner: it has no {sorted(missing)[0]!r}.")
        want, got = self.model.state_dict(), tree["model"]
        if want.keys() != got.keys() or any(want[n].shape != got[n].shape for n in want):
            odd = sorted(want.keys() ^ got.keys()) or [n for n in want if want[n].shape != got[n].shape]
            raise CheckpointError(
                f"The checkpoint belongs to another model: {len(odd)} tensors differ, {odd[0]!r} first."
            )
        if (tree["counts"] is None) != (self.counts is None):
            raise CheckpointError("The checkpoint and the learner differ in whether they count.")
        if tree["guards"] != self._guards:
            before, now = (", ".join(names) or "no strategy" for names in (tree["guards"], self._guards))
            raise CheckpointError(f"The checkpoint was written with {before}, but this learner has {now}.")
        optimizer = dict(tree["optimizer"])
        if isinstance(self.optimizer, torch.optim.Optimizer):
            # its keys are numbers, which JSON made strings
            optimizer["state"] = {int(k): v for k, v in optimizer["state"].items()}
        before_optimizer, before_strategies = deepcopy((self.optimizer.state_dict(), self.strategies.state_dict()))
        try:
            self.optimizer.load_state_dict(optimizer)
            self.strategies.load_state_dict(tree["strategies"])
            if self.counts:
                self.counts.load_state_dict(tree["counts"])
        except (RemanenceError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            self.optimizer.load_state_dict(before_optimizer)
            self.strategies.load_state_dict(before_strategies)
            if isinstance(error, RemanenceError):
                raise
            raise CheckpointError(f"The optimiser or a strategy cannot take over the checkpoint: {error}.") from None
        self.model.load_state_dict(got)
        self.state, self.last, self.step = tree["state"], tree["last"], tree["step"]
        torch.set_rng_state(tree["generator"])

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, atomically."""
        checkpoint.write(Path(path), {"learner": self.state_dict()})

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint that a learner of the same make saved."""
        self.load_state_dict(checkpoint.read(Path(path)).get("learner", {}))

    @property
    def _guards(self) -> list[str]:
        return [type(s).__name__ for s in self.strategies.members]

    def _beginning(self, rows: int) -> Tensor:
        first = getattr(self.model, "beginning", self.model.vocabulary)  # published models have a token of their own
        return torch.full((rows, 1), int(first), dtype=torch.long)  # type: ignore[arg-type]

    def _shifted(self, tokens: Tensor, task: str | int | None) -> Batch:
        last = self.last if self.last is not None else self._beginning(tokens.shape[0])
        self.last = tokens[:, -1:].clone()
        return Batch(torch.cat([last, tokens[:, :-1]], dim=1), tokens, tokens.shape[0], task)

    def _forward(self, rows: Batch) -> tuple[Tensor, State | None]:
        if not self.recurrent:
            return self.model(rows.inputs), None
        if self.state is None:
            self.state = self.model.initial_state(rows.fresh)  # type: ignore[operator]
        added = rows.inputs.shape[0] - rows.fresh
        state = self.state
        if added:
            state = concat([state, self.model.initial_state(added)])  # type: ignore[operator]
        outputs, after = self.model(rows.inputs, state)
        return outputs, detach(_first(after, rows.fresh)) if added else detach(after)

    def _score(self, batch: Batch, outputs: Tensor) -> _Scored:
        if self.counts is None:
            return _Scored(_surprise(outputs, batch.targets).double() / math.log(2))
        data = batch.targets[0].numpy().astype(np.uint8)
        log_probs = F.log_softmax(outputs[0].float(), -1).numpy()
        return _Scored(self._counting.submit(self.counts.observe, data, log_probs, learn=self.learning))

    def _finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise RemanenceError(
                f"The {what} stopped being finite at step {self.step}: a smaller learning rate may hold it. "
                "The weights and the last checkpoint are as they were before."
            )

    def _step(self) -> None:
        named = dict(self.model.named_parameters())
        self.strategies.transform_grad(named)
        self._finite("gradient", nn.utils.clip_grad_norm_(self.model.parameters(), self.clip))
        if self.schedule:
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.schedule(self.step)
        self.optimizer.step()
        self.strategies.after_step(named)
        self.step += 1

    def _next(self, log_probs: Tensor) -> np.ndarray:
        if self.counts:
            return self.counts.distribution(log_probs.numpy())
        return log_probs.double().exp().numpy()


class _Scored:
    """Bits that are there, or that the counts are still working out."""

    def __init__(self, bits: Any):
        self._bits = bits

    def result(self) -> Tensor:
        if isinstance(self._bits, Tensor):
            return self._bits
        return torch.from_numpy(self._bits.result())[None]


def _surprise(outputs: Tensor, targets: Tensor) -> Tensor:
    flat = F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def _first(state: State, rows: int) -> State:
    return {k: _first(v, rows) if isinstance(v, dict) else v[:rows].clone() for k, v in state.items()}


def _sample(probabilities: np.ndarray, temperature: float, generator: np.random.Generator) -> int:
    if temperature == 0:
        return int(probabilities.argmax())
    logits = np.log(np.maximum(probabilities, 1e-300)) / temperature
    weights = np.exp(logits - logits.max())
    return int(generator.choice(len(weights), p=weights / weights.sum()))
