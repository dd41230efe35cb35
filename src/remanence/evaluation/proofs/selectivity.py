"""Proofs of the benchmarks that ask for selectivity and for exact recall: grammars, and hybrids of two memories."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.evaluation.benchmarks.selectivity import Selectivity
from remanence.evaluation.benchmarks.tasks import score
from remanence.evaluation.proofs.linear import normals
from remanence.models.hybrid import hybrid_stack
from remanence.models.language import parse_pattern
from remanence.streams.grammar import Grammar


@proof(
    "selectivbench",
    "The past tells every hidden state, through gaps and distractors; the symbol alone tells it as often as the floor.",
)
def selectivity() -> tuple[Check, Check]:
    plain = Grammar(13, 12, 12, gap=0.5)
    grammars = [plain, replace(plain, gap=1.0, noise=0.2), replace(plain, gap_prob=0.3, gap_start=20, distractors=True)]
    likeliest = torch.stack([torch.where(plain.symbol_of == s, plain.stationary, -1).argmax() for s in range(13)])

    def by_symbol(symbols: Tensor, grammar: Grammar) -> Tensor:
        """The commonest copy of the last symbol that was no distractor: nothing else of the past is used."""
        last = grammar.symbol_of[grammar.track(symbols)]
        return likeliest[last]

    def check(predict: Callable[[Tensor, Grammar], Tensor]) -> Check:
        shares, legal = [], True
        for seed, grammar in enumerate(grammars):
            drawn = grammar.draw(30, 400, torch.Generator().manual_seed(seed))
            first = drawn.elements.diff(dim=1, prepend=drawn.elements[:, :1] - 1) == 1
            before = torch.cat([torch.zeros_like(drawn.states[:, :1]), drawn.states[:, :-1]], 1)
            allowed = grammar.table[before, drawn.symbols.clamp(min=0)] >= 0
            legal &= bool(allowed[first].all()) and not bool((allowed & (drawn.symbols >= 0))[~first].any())
            task = Selectivity(grammar, 400)
            batch = task.draw(30, torch.Generator().manual_seed(seed))
            guess = predict(drawn.symbols, grammar)
            right, asked = score(F.one_hot(guess, task.vocabulary).float(), batch)
            shares.append(right / asked)
        figures = ", ".join(f"{share:.3f}" for share in shares)
        return Check(legal and min(shares) == 1, f"{figures} right, floor {plain.floor:.3f}")

    return check(lambda symbols, grammar: grammar.track(symbols)), check(by_symbol)


@proof(
    "hybrid-analysis",
    "16 pairs are recalled by one full layer in four; four recurrent layers with keys of 4 features cannot.",
)
def hybrids() -> tuple[Check, Check]:
    pairs, width = 16, 4
    # the corners of a cube of four dimensions: as far apart as 16 keys of 4 features can well be
    corners = torch.tensor(list(itertools.product((-0.5, 0.5), repeat=width)), dtype=torch.float64)
    maps = normals(0)(4, width, width)

    def heard(pattern: str, seed: int) -> tuple[Tensor, Tensor]:
        """What each layer reads of the values at the queries [rows·pairs, layers·width + 1], and the right answers."""
        source = torch.Generator().manual_seed(seed)
        key, value, order = (torch.rand(100, pairs, generator=source).argsort(1) for _ in range(3))
        nothing = torch.zeros(100, 1, pairs, width, dtype=torch.float64)
        v = torch.cat([corners[value][:, None], nothing], 2)
        said = torch.cat([corners[key], corners[key.gather(1, order)]], 1)[:, None]
        read = []
        for layer, name in zip(maps, parse_pattern(pattern), strict=True):
            if name == "sliding-window":  # over the keys only: a query must not find itself
                keys = (said[:, :, :pairs], v[:, :, :pairs])
                reach = torch.softmax(40 * said[:, :, pairs:] @ keys[0].mT, -1) @ keys[1]
            else:
                k = F.normalize(said @ layer, dim=-1)
                write = torch.cat([torch.ones(100, 1, pairs), torch.zeros(100, 1, pairs)], 2).double()
                reach = ops.gated_delta_rule(k, k, v, write)[0][:, :, pairs:]
            read.append(reach[:, 0])
        features = torch.cat([*read, torch.ones_like(read[0][..., :1])], -1)
        return features.flatten(0, 1), value.gather(1, order).flatten()

    def accuracy(ratio: str) -> float:
        """Of the best linear readout of all four layers, fitted on other texts."""
        pattern = hybrid_stack("gated-deltanet", "sliding-window", ratio, layers=4)
        features, answer = heard(pattern, 1)
        target = F.one_hot(answer, pairs).double()
        readout = torch.linalg.lstsq(features, target, driver="gelsd").solution
        features, answer = heard(pattern, 2)
        return float(((features @ readout).argmax(-1) == answer).double().mean())

    full, mixed, pure = (accuracy(ratio) for ratio in ("0:1", "3:1", "1:0"))
    return (
        Check(mixed > 0.95 and pure < 0.6, f"{mixed:.2f} right at 3:1, {full:.2f} with full layers only"),
        Check(pure > 0.95, f"{pure:.2f} right with delta rules only, states of {width} × {width}"),
    )
