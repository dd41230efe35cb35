"""Two levels of a continuum memory, of which the slow one keeps what the fast one is made to let go.

Over seeds 0 to 5 the nested pair starts on its old task at 0.27 to 0.43 of the fast level's loss, and the same pair
without restarts at 0.97 to 1.02; the proof runs seed 0.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn

from remanence.catalogue import Check, proof
from remanence.optim.clocks import Clock, Clocks

WIDTH, OLD, NEW, BACK = 8, 1200, 100, 30


def _loss_back_on_the_old_task(levels: Literal["fast", "both", "nested"], seed: int = 0) -> float:
    """Mean loss on the first steps back on task A, after many steps of A and some of B."""
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5 for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fast, slow = (nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH)) for _ in range(2))
    sgd = partial(torch.optim.SGD, foreach=False)
    clocks = [Clock(fast, 1, partial(sgd, lr=0.03), restart=NEW if levels == "nested" else None)]
    if levels != "fast":
        clocks.append(Clock(slow, 16, partial(sgd, lr=0.004), reduce="sum"))
    optimizer = Clocks(*clocks)
    back = []
    for step in range(OLD + NEW + BACK):
        x = torch.randn(16, WIDTH, generator=g)
        y = (1.5 * x @ (B if OLD <= step < OLD + NEW else A).mT).tanh()
        said = fast(x) if levels == "fast" else fast(x) + slow(x)
        loss = (said - y).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= OLD + NEW:
            back.append(loss.item())
    return sum(back) / BACK


@proof(
    "nested-learning",
    "After 100 steps of another task, a fast level that restarts beside a slow one returns to the old task with at "
    "most half the loss of the fast level alone; its control, the same two levels without restarts, does not.",
)
def nested_learning() -> tuple[Check, Check]:
    alone, both, nested = (_loss_back_on_the_old_task(levels) for levels in ("fast", "both", "nested"))

    def check(loss: float) -> Check:
        return Check(loss <= 0.5 * alone, f"loss {loss:.2f} on the first steps back, beside {alone:.2f}")

    return check(nested), check(both)
