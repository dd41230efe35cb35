"""Proofs of the linearisations: what keeps a taught softmax layer's weights, and what it takes to win back its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import Check, proof
from remanence.evaluation.proofs.linear import gap, seeded
from remanence.memory.softmax import SoftmaxAttention
from remanence.models.language import LanguageModel
from remanence.models.linearise import adapt, attention_transfer, linearise, new_parameters


def _fit(parameters: list[nn.Parameter], loss: Callable[[], Tensor], steps: int, rate: float = 1e-2) -> None:
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@proof("liger", "The same parameters, read as a recurrence: a few steps of a low-rank change win back what that costs.")
def liger() -> tuple[Check, Check]:
    source = torch.Generator().manual_seed(0)
    many, batch, time = 8, 8, 24

    def draw() -> Tensor:
        """x_t = x_{t−1} + x_0, or anything at all: the first token must be remembered."""
        x = torch.randint(many, (batch, time), generator=source)
        follows = torch.rand(batch, time, generator=source) < 0.9
        for t in range(1, time):
            x[:, t] = torch.where(follows[:, t], (x[:, t - 1] + x[:, 0]) % many, x[:, t])
        return x

    def loss(model: LanguageModel, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten())

    exam = torch.cat([draw() for _ in range(16)])

    def score(model: LanguageModel) -> float:
        with torch.no_grad():
            return loss(model, exam).item()

    arguments = {"softmax": {"heads": 2}}
    base = seeded(lambda: LanguageModel("softmax", vocabulary=many, dim=32, ngrams=(), arguments=arguments), 0).float()
    _fit(list(base.parameters()), lambda: loss(base, draw()), 150)
    same = linearise(base, "liger", mix=(0.0, 1.0), window=time)
    with torch.no_grad():
        off = gap(same(exam)[0], base(exam)[0])
    alike = {n: p.shape for n, p in same.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
    goal, student = score(base), linearise(base, "liger", window=4)
    frozen = score(student)

    def check(steps: int) -> Check:
        if steps:
            trained = seeded_adapters(student)
            _fit(trained, lambda: loss(student, draw()), steps)
        now = score(student)
        return Check(
            alike and off < 1e-4 and frozen - goal > 0.05 and frozen - now > 0.7 * (frozen - goal),
            f"loss {goal:.2f} with softmax, {frozen:.2f} as a recurrence, {now:.2f} after {steps} steps; "
            f"a window over everything is {off:.0e} off",
        )

    control = check(0)
    return check(100), control


def seeded_adapters(model: nn.Module) -> list[nn.Parameter]:
    """Low-rank changes, drawn without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return adapt(model, 4)


@proof("lizard", "Taught to imitate a layer's attention it misses little of it; a window with meta tokens misses more.")
def lizard() -> tuple[Check, Check]:
    source = torch.Generator().manual_seed(1)
    teacher = seeded(lambda: SoftmaxAttention(16, heads=2), 0).float()
    with torch.no_grad():
        teacher.qkv.weight *= 2

    def draw() -> Tensor:
        """Random walks, of which a distant token tells something that the near ones do not."""
        return torch.randn(8, 64, 16, generator=source).cumsum(1) / torch.arange(1, 65)[:, None] ** 0.5

    exam = draw()

    def error(past: bool) -> float:
        student = seeded(lambda: linearise(teacher, "lizard", window=8, features=16), 2).float()
        trained = new_parameters(student)
        if not past:  # every token forgets all others, and the features leave it the weight of one of them
            for name, p in student.named_parameters():
                if name.endswith("_map") or name == "forget.weight":
                    p.data.zero_()
                if name == "forget.bias":
                    p.data.fill_(-60)
            trained = [p for name, p in student.named_parameters() if name == "meta"]
        _fit(trained, lambda: attention_transfer(student, teacher, draw()), 60, 2e-2)
        long = torch.randn(1, 4096, 16, generator=source)
        with torch.no_grad():
            finite = student(10 * long)[0].isfinite().all()
            return attention_transfer(student, teacher, exam).item() if finite else float("nan")

    with torch.no_grad():
        scale = teacher(exam)[0].square().mean().item()
    full, near = error(past=True) / scale, error(past=False) / scale

    def check(found: float) -> Check:
        return Check(found < 0.15, f"misses {found:.1%} of the teacher's variance")

    return check(full), check(near)
