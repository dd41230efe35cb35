"""AdamW computes what PyTorch's does, and takes its state along."""

import pytest
import torch
from torch import nn

from remanence.errors import CheckpointError
from remanence.optim.adamw import AdamW


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def train(net, optimizer, steps, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(5, 6, generator=g)).square().mean().backward()
        optimizer.step()


def test_it_equals_pytorchs_with_decay_on_matrices_only():
    ours, theirs = model(), model()
    named = list(theirs.parameters())
    groups = [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    train(ours, AdamW(ours.parameters(), 1e-2, weight_decay=0.1), 20)
    train(theirs, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98)), 20)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    undecayed = model()
    train(undecayed, AdamW(undecayed.parameters(), 1e-2, weight_decay=0.0), 20)
    assert (undecayed[0].weight - ours[0].weight).abs().max() > 1e-4


def test_a_parameter_without_gradient_is_left_alone():
    net = model()
    frozen = net[0].weight.clone()
    net[0].weight.requires_grad_(False)
    optimizer = AdamW(net.parameters(), 1e-2)
    train(net, optimizer, 3)
    assert torch.equal(net[0].weight, frozen)


def test_its_state_continues_exactly():
    one, two = model(), model()
    first, second = AdamW(one.parameters(), 1e-2), AdamW(two.parameters(), 1e-3)
    train(one, first, 5)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    train(one, first, 5, seed=2)
    train(two, second, 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_foreign_state_is_refused_and_nothing_changes():
    net, other = model(), nn.Linear(6, 9)
    optimizer = AdamW(net.parameters())
    train(net, optimizer, 2)
    before = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    with pytest.raises(CheckpointError, match="another model"):
        optimizer.load_state_dict(AdamW(other.parameters()).state_dict())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][k], v) for i, s in before.items() for k, v in s.items())


def test_a_rate_must_be_positive():
    with pytest.raises(ValueError, match="lr must be > 0"):
        AdamW(model().parameters(), lr=0)
