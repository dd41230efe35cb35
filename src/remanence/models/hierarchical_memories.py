"""Hierarchical memories: a small model, and a tree of blocks of which each document fetches one per level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import StateError, expect
from remanence.models.language import Block, LanguageModel
from remanence.state import State, kind

SOURCE = "arXiv:2510.02375"


class ClusterTree(nn.Module):
    """Hierarchical k-means: every cluster of a level has `branch` children.

    Args:
        dim: features of an embedding.
        branch: k, children per cluster.
        levels: p; level l has branch^l clusters, counted from 1.

    Shapes: embeddings [documents, dim]; a route is int64 [documents, levels], the cluster's number at each level, whose
    parent is that number divided by `branch`.
    Raises: `ValueError` for sizes below 1; `ShapeError`.
    """

    def __init__(self, dim: int, *, branch: int = 16, levels: int = 4):
        super().__init__()
        if min(dim, branch, levels) < 1:
            raise ValueError(f"ClusterTree: sizes must be at least 1, got {dim=}, {branch=}, {levels=}.")
        self.dim, self.branch, self.levels = dim, branch, levels
        for level in range(1, levels + 1):
            self.register_buffer(f"centroids{level}", torch.zeros(branch**level, dim))

    @torch.no_grad()
    def fit(self, embeddings: Tensor, *, rounds: int = 20, seed: int = 0) -> ClusterTree:
        """Cluster documents level by level, by Lloyd's algorithm from k-means++ starts; returns itself."""
        expect("ClusterTree", "embeddings", embeddings, "documents dim", dim=self.dim)
        generator = torch.Generator().manual_seed(seed)
        parents = torch.zeros(len(embeddings), dtype=torch.long)
        for level in range(1, self.levels + 1):
            centroids = self.get_buffer(f"centroids{level}").view(-1, self.branch, self.dim)
            for parent in parents.unique().tolist():
                members = embeddings[parents == parent]
                centroids[parent] = _k_means(members, self.branch, rounds, generator)
            parents = self.route(embeddings)[:, level - 1]
        return self

    def route(self, embeddings: Tensor) -> Tensor:
        """The clusters of each document, from the root down: always the nearest child."""
        expect("ClusterTree", "embeddings", embeddings, "documents dim", dim=self.dim)
        at, found = torch.zeros(len(embeddings), dtype=torch.long), []
        for level in range(1, self.levels + 1):
            children = self.get_buffer(f"centroids{level}").view(-1, self.branch, self.dim)[at]
            distance = (children - embeddings[:, None]).square().sum(-1)
            at = at * self.branch + distance.argmin(1)
            found.append(at)
        return torch.stack(found, 1)


def _k_means(points: Tensor, k: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Centroids [k, dim]; those that attract no point stay where they began."""
    first = torch.randint(len(points), (1,), generator=generator)
    centroids = points[first]
    for _ in range(k - 1):
        nearest = torch.cdist(points, centroids).amin(1).square() + 1e-12
        centroids = torch.cat([centroids, points[torch.multinomial(nearest, 1, generator=generator)]])
    for _ in range(rounds):
        owner = torch.cdist(points, centroids).argmin(1)
        counts = torch.bincount(owner, minlength=k)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, owner, points)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


class MemoryBank(nn.Module):
    """Blocks of hidden units for the mixers of a model: one block per cluster of a tree, with a part for each layer.

    Args:
        dim: features of the mixers' input.
        ranks: hidden units of a block by level; the paper's smallest model has (256, 64, 16).
        branch: children per cluster, as in the tree.
        layers: mixers that a block serves.
        sparse: gradients as sparse tensors, for banks that are large beside what is fetched.

    A block's output weights start at zero, so a new bank changes nothing. `generic` is a further block of the same
    size as what is fetched, for documents without a place in the tree. Train the tables with `BlockAdam`: a dense
    optimiser moves blocks that nothing fetched.
    Shapes: a table is [branch^level, layers · 3 · rank · dim].
    Raises: `ValueError` for no level, or sizes below 1 (a rank may be 0).
    """

    def __init__(self, dim: int, ranks: Sequence[int], *, branch: int = 16, layers: int = 1, sparse: bool = False):
        super().__init__()
        if not ranks or min(dim, branch, layers) < 1 or min(ranks) < 0:
            given = f"{dim=}, ranks={tuple(ranks)}, {branch=}, {layers=}"
            raise ValueError(f"MemoryBank: at least one level and sizes of at least 1 are needed, got {given}.")
        self.dim, self.ranks, self.branch, self.layers, self.sparse = dim, tuple(ranks), branch, layers, sparse
        self.tables = nn.ParameterList(self._blocks(branch ** (i + 1), rank) for i, rank in enumerate(ranks))
        self.generic = nn.Parameter(self._blocks(1, sum(ranks))[0])

    def _blocks(self, rows: int, rank: int) -> Tensor:
        blocks = torch.randn(rows, self.layers, 3, rank, self.dim) * self.dim**-0.5
        blocks[:, :, 2] = 0
        return blocks.flatten(1)

    def fetch(self, route: Tensor) -> Tensor:
        """The weights of each document, [documents, layers, 3, Σ ranks, dim]; -1 fetches the generic block."""
        expect("MemoryBank", "route", route, "documents levels", levels=len(self.ranks))
        nowhere = route[:, 0] < 0
        generic = self.generic.view(1, self.layers, 3, -1, self.dim)
        if nowhere.all():
            return generic.expand(len(route), -1, -1, -1, -1)
        parts = []
        for numbers, table, rank in zip(route.unbind(1), self.tables, self.ranks, strict=True):
            rows = F.embedding(numbers.clamp(min=0), table, sparse=self.sparse)
            parts.append(rows.view(len(route), self.layers, 3, rank, self.dim))
        fetched = torch.cat(parts, 3)
        return torch.where(nowhere.view(-1, 1, 1, 1, 1), generic, fetched) if nowhere.any() else fetched

    def on_disk(self, folder: Path) -> MemoryBank:
        """Move the tables into memory-mapped files, one per level, that every step writes to; returns itself."""
        for i, table in enumerate(self.tables):
            path = str(folder / f"level{i + 1}.bin")
            mapped = torch.from_file(path, shared=True, size=table.numel(), dtype=table.dtype).view(table.shape)
            table.data = mapped.copy_(table.data)
        return self


def side_units(x: Tensor, weights: Tensor) -> Tensor:
    """W_dᵀ(SiLU(W_g x) ⊙ W_u x) with the units that each document fetched.

    Shapes: x [documents, ..., dim], weights [documents, 3, units, dim] -> as x.
    """
    rows = x.reshape(len(x), -1, x.shape[-1])
    gate, up, down = weights.unbind(1)
    return ((F.silu(rows @ gate.mT) * (rows @ up.mT)) @ down).view(x.shape)


def forgo(route: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The route with a random share of documents sent to the generic block (the paper: 1/17, while training)."""
    gone = torch.rand(len(route), generator=generator) < share
    return torch.where(gone[:, None], -1, route)


@card(
    "hierarchical-memories",
    kind="tool",
    says="A small model whose mixers are widened, per document, by blocks from a tree of clusters.",
    source=SOURCE,
)
class HierarchicalMemories(nn.Module):
    r"""A language model whose mixers are widened: $W_d(σ(W_g x) ⊙ W_u x) + Σ_l W_d^l(σ(W_g^l x) ⊙ W_u^l x)$, σ = SiLU.

    The sum runs over the blocks that the row's document fetched, one per level of the tree. Only they are read
    and trained, so that what is rare is not overwritten by what is common. The route is part of the state: it may
    differ from row to row, is saved with it, and is -1 (the generic block) until `routed` gives one. Route by the
    context, never by what is to be predicted.

    Args:
        model: the anchor, trained or not; its blocks' mixers are widened.
        tree: clusters of the documents' embeddings (the paper: of all-MiniLM-L6-v2, 16 children, 4 levels).
        ranks: hidden units fetched per level; in the paper the fetched weights are a tenth of the anchor's.
        sparse: as in `MemoryBank`.

    Shapes: tokens, logits as `LanguageModel`; state {"model": its, "route": int64 [batch, levels]}.
    Raises: `StateError` for a state of another model; as `MemoryBank` does.
    Source: Pretraining with hierarchical memories (2025), arXiv:2510.02375.
    """

    def __init__(self, model: LanguageModel, tree: ClusterTree, ranks: Sequence[int], *, sparse: bool = False):
        super().__init__()
        if len(ranks) != tree.levels:
            raise ValueError(f"HierarchicalMemories: the tree has {tree.levels} levels, but ranks are {tuple(ranks)}.")
        self.model, self.tree, self.vocabulary = model, tree, model.vocabulary
        self.bank = MemoryBank(model.dim, ranks, branch=tree.branch, layers=len(model.blocks), sparse=sparse)

    def initial_state(self, batch: int) -> State:
        """Nothing read, no document known."""
        route = torch.full((batch, self.tree.levels), -1, device=self.bank.generic.device)
        return {"model": self.model.initial_state(batch), "route": route}

    def routed(self, state: State, embeddings: Tensor) -> State:
        """The same state, each row now in the document of that embedding [batch, dim of the tree]."""
        return {**state, "route": self.tree.route(embeddings)}

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.initial_state(tokens.shape[0]) if state is None else state
        self._check(state, tokens.shape[0])
        model, inner = self.model, state["model"]
        weights = self.bank.fetch(state["route"])
        x, recent = model._embed(tokens, inner["recent"])
        layers: State = {}
        context: dict[str, Tensor] = {}
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            before = block.memory_norm(x)
            past = inner["layers"][str(i)]
            y, layers[str(i)] = block.memory(before, past, context) if block.shares else block.memory(before, past)
            x = x + y
            z = block.mixer_norm(x)
            x = x + block.mixer(z) + side_units(z, weights[:, i])
        return model.head(model.norm(x)), {"model": {"recent": recent, "layers": layers}, "route": state["route"]}

    def _check(self, state: State, batch: int) -> None:
        route = state.get("route")
        if state.keys() != {"model", "route"} or route is None or kind(route) != "integer":
            raise StateError(f"HierarchicalMemories: this state belongs to another model: it holds {sorted(state)}.")
        if route.shape != (batch, self.tree.levels):
            want = [batch, self.tree.levels]
            raise StateError(f"HierarchicalMemories: the state's route must be {want}, got {list(route.shape)}.")
        self.model.check_state(state["model"], batch)
