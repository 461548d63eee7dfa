"""Shipped models, their builder, and the refusals of models that give no logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from likelihood_lab.errors import UsageError
from pipeline.models import ModelBuilder, Shape, cnn, mlp, softmax_regression

Make = Callable[..., Any]

SHIPPED: tuple[Make, ...] = (
    softmax_regression,
    mlp,
    partial(mlp, hidden=[7, 5], dropout=0.5, batch_norm=True),
    partial(cnn, channels=[4], hidden=8, dropout=0.5),
)


@pytest.mark.parametrize("make", SHIPPED)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12)])
def test_shipped_model_has_one_logit_per_class(make: Make, shape: Shape) -> None:
    module = ModelBuilder(make, "shipped", shape, 7)(0).eval()
    assert module(torch.zeros(5, *shape)).shape == (5, 7)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_softmax_regression_has_a_weight_per_pixel_and_class() -> None:
    assert sum(p.numel() for p in softmax_regression((3, 4, 5), 10).parameters()) == 3 * 4 * 5 * 10 + 10


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"hidden": [6], "dropout": 0.5, "batch_norm": True}, "Flatten Linear BatchNorm1d ReLU Dropout Linear"),
        ({"hidden": [6, 5]}, "Flatten Linear ReLU Linear ReLU Linear"),
        ({"hidden": []}, "Flatten Linear"),
    ],
    ids=["all", "two hidden", "none hidden"],
)
def test_mlp_has_its_layers_in_order(settings: dict[str, Any], layers: str) -> None:
    assert " ".join(type(layer).__name__ for layer in mlp((1, 8, 8), 10, **settings)) == layers


def test_cnn_has_no_bias_before_batch_norm() -> None:
    assert all(layer.bias is None for layer in cnn((1, 8, 8), 10).modules() if isinstance(layer, nn.Conv2d))


def test_too_many_poolings_are_refused() -> None:
    with pytest.raises(UsageError, match="4 poolings reduce a 8 x 8 picture to size 0"):
        ModelBuilder(partial(cnn, channels=[4] * 4), "cnn", (1, 8, 8), 10)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """Seed 0 is a seed as well, and gives the weights of `manual_seed(0)`."""
    build = ModelBuilder(mlp, "mlp", (1, 4, 4), 3)
    weights = [build(seed)[1].weight for seed in (0, 0, 1)]
    torch.rand(3)  # other draws do not matter
    weights.append(build(0)[1].weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[3])
    assert not torch.equal(weights[0], weights[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.equal(weights[0], mlp((1, 4, 4), 3)[1].weight)


@pytest.mark.usefixtures("untouched_randomness")
@pytest.mark.parametrize("make", SHIPPED)
def test_builder_keeps_the_global_random_state(make: Make) -> None:
    ModelBuilder(make, "shipped", (1, 4, 4), 3)(5)


def test_colour_model_gets_three_channels_of_grey_data() -> None:
    assert ModelBuilder(resnet18, "resnet18", (1, 16, 16), 3).input_shape == (3, 16, 16)
    assert ModelBuilder(softmax_regression, "softmax_regression", (1, 16, 16), 3).input_shape == (1, 16, 16)


class Users(nn.Module):
    """A model without an `input_shape`."""

    def __init__(self, columns: int = 16, num_classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(columns, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.flatten(1))


def test_model_receives_only_arguments_that_it_takes() -> None:
    assert ModelBuilder(Users, "users", (1, 4, 4), 5)(0).head.out_features == 5
    assert ModelBuilder(lambda: Users(16, 3), "fixed", (1, 4, 4), 3)(0).head.out_features == 3


class Detached(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1)[:, :3]


class Parts(Users):
    def forward(self, inputs: Tensor) -> Any:
        return {"logits": super().forward(inputs)}


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Users(16, 4), r"maps a batch of 2 to \[2, 4\]; logits of shape \[2, 3\] are needed"),
        (Parts, "maps a batch of 2 to dict"),
        (lambda: Users(15), r"does not take inputs of shape \[1, 4, 4\]: mat1 and mat2"),
        (lambda: Detached(), "has no trainable parameters"),
        (lambda: "network", r"returned str, not a torch\.nn\.Module"),
        (lambda: 1 / 0, r"does not take inputs of shape \[1, 4, 4\]: division by zero"),
    ],
    ids=["class count", "dict", "input size", "no parameters", "no module", "raises"],
)
def test_model_without_logits_is_refused_in_one_line(make: Make, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as refused:
        ModelBuilder(make, "users", (1, 4, 4), 3)
    assert "\n" not in str(refused.value)
