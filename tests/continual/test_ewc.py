"""The EWC penalty, its gradient and its importance are those of the formulas."""

import math

import pytest
import torch

from remanence.continual import EWC, Batch, Context
from remanence.errors import ShapeError, StateError


def model() -> torch.nn.Linear:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3) / 10)
        layer.bias.zero_()
    return layer


def with_gradients(layer: torch.nn.Module, *values: float) -> dict[str, torch.nn.Parameter]:
    for p, value in zip(layer.parameters(), values, strict=True):
        p.grad = torch.full_like(p, value)
    return dict(layer.named_parameters())


def context(layer: torch.nn.Module) -> Context:
    x = torch.zeros(1, 3)
    return Context(layer, Batch(x, torch.zeros(1, dtype=torch.long), 1), x, torch.zeros(()))


def consolidated(strength: float = 7.0, **arguments: float) -> tuple[EWC, torch.nn.Linear]:
    ewc, layer = EWC(strength, **arguments), model()
    ewc.attach(layer)
    ewc.transform_grad(with_gradients(layer, 2.0, 3.0))
    ewc.on_boundary("a")
    return ewc, layer


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": -1.0},
        {"strength": math.nan},
        {"strength": math.inf},
        {"decay": 1.1},
        {"decay": math.nan},
        {"average": 1.0},
        {"every": 0},
    ],
)
def test_arguments_refused(wrong):
    with pytest.raises(ValueError, match=f"ewc: {next(iter(wrong))} must be"):
        EWC(**wrong)


def test_penalty_and_its_gradient():
    ewc, layer = consolidated()
    assert ewc.loss(context(layer)).item() == 0
    with torch.no_grad():
        layer.weight += 0.5
        layer.bias -= 1.0
    layer.zero_grad()
    penalty = ewc.loss(context(layer))
    penalty.backward()
    assert penalty.item() == pytest.approx(0.5 * 7 * (6 * 4 * 0.25 + 2 * 9 * 1.0))
    assert torch.allclose(layer.weight.grad, torch.full((2, 3), 7 * 4 * 0.5))
    assert torch.allclose(layer.bias.grad, torch.full((2,), 7 * 9 * -1.0))


def test_no_penalty_before_the_first_boundary_or_without_strength():
    ewc, layer = EWC(), model()
    ewc.attach(layer)
    ewc.on_boundary("nothing was learned")
    assert ewc.loss(context(layer)) is None
    silent, layer = consolidated(strength=0.0)
    assert silent.loss(context(layer)) is None


def test_importance_is_the_exponential_mean_of_squares():
    ewc, layer = EWC(average=0.5), model()
    ewc.attach(layer)
    for g in (1.0, 2.0, 4.0):
        ewc.transform_grad(with_gradients(layer, g, -g))
    ewc.on_boundary("a")
    expected = (0.125 * 1 + 0.25 * 4 + 0.5 * 16) / (1 - 0.125)
    assert torch.allclose(ewc.importance["bias"], torch.full((2,), expected))


def test_importance_leaves_the_penalty_out():
    ewc, layer = consolidated(strength=7.0, decay=0.0)
    with torch.no_grad():
        layer.weight += 0.25
        layer.bias += 0.25
    layer.zero_grad()
    (ewc.loss(context(layer)) + layer.weight.sum() + layer.bias.sum()).backward()
    ewc.transform_grad(dict(layer.named_parameters()))
    ewc.on_boundary("b")
    assert torch.allclose(ewc.importance["weight"], torch.ones(2, 3))


def test_importance_folds_with_decay_and_the_anchor_moves():
    ewc, layer = consolidated(decay=0.5)
    with torch.no_grad():
        layer.bias += 1
    ewc.strength = 0.0  # so that the gradients set below are all data
    ewc.transform_grad(with_gradients(layer, 1.0, 1.0))
    ewc.on_boundary("b")
    assert torch.allclose(ewc.importance["weight"], torch.full((2, 3), 0.5 * 4 + 1))
    assert torch.equal(ewc.anchor["bias"], layer.bias)
    assert ewc.anchor["bias"].data_ptr() != layer.bias.data_ptr()


def test_steps_as_boundaries():
    ewc, layer = EWC(every=2), model()
    assert not ewc.needs
    assert EWC().needs == {"boundaries"}
    for step in range(5):
        parameters = with_gradients(layer, 1.0, 1.0)
        ewc.transform_grad(parameters)
        ewc.after_step(parameters)
        assert bool(ewc.anchor) == (step >= 1)
    assert ewc.steps == 1


def test_frozen_parameters_are_left_out():
    ewc, layer = EWC(), model()
    ewc.attach(layer)
    parameters = with_gradients(layer, 1.0, 1.0)
    layer.bias.grad = None
    ewc.transform_grad(parameters)
    ewc.on_boundary("a")
    assert set(ewc.anchor) == {"weight"}


def test_half_precision_is_kept_in_float32():
    ewc, layer = EWC(), model().bfloat16()
    ewc.attach(layer)
    ewc.transform_grad(with_gradients(layer, 1e-3, 1e-3))
    ewc.on_boundary("a")
    assert ewc.importance["weight"].dtype == ewc.anchor["weight"].dtype == torch.float32


def test_a_parameter_that_grew_is_refused():
    ewc, layer = consolidated()
    layer.bias = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(ShapeError, match=r"bias was \[2\] at the last boundary, now \[5\]"):
        ewc.loss(context(layer))


def test_a_boundary_without_a_model_is_refused():
    with pytest.raises(StateError, match="attach it to a model"):
        EWC().on_boundary("a")


def test_bytes_kept():
    ewc, layer = consolidated()
    assert ewc.state_bytes() == 3 * 4 * sum(p.numel() for p in layer.parameters())
