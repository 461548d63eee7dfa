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


def names(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module.children()]


@pytest.mark.parametrize("make", SHIPPED)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12)])
def test_a_shipped_model_maps_pictures_to_one_logit_a_class(make: Make, shape: Shape) -> None:
    module = ModelBuilder(make, "shipped", shape, 7)(0).eval()
    assert module(torch.zeros(5, *shape)).shape == (5, 7)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_softmax_regression_has_one_weight_for_each_pixel_and_class() -> None:
    assert sum(p.numel() for p in softmax_regression((3, 4, 5), 10).parameters()) == 3 * 4 * 5 * 10 + 10


def test_the_mlps_layers_are_linear_batch_norm_relu_dropout() -> None:
    module = mlp((1, 8, 8), 10, hidden=[6], dropout=0.5, batch_norm=True)
    assert names(module) == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert names(mlp((1, 8, 8), 10, hidden=[6, 5])) == [
        "Flatten",
        "Linear",
        "ReLU",
        "Linear",
        "ReLU",
        "Linear",
    ]
    assert names(mlp((1, 8, 8), 10, hidden=[])) == ["Flatten", "Linear"]


def test_no_layer_of_the_cnn_has_a_bias_that_batch_norm_would_take_away() -> None:
    assert all(layer.bias is None for layer in cnn((1, 8, 8), 10).modules() if isinstance(layer, nn.Conv2d))


def test_more_poolings_than_the_picture_has_halves_are_refused() -> None:
    with pytest.raises(UsageError, match="4 poolings reduce a 8 x 8 picture to size 0"):
        ModelBuilder(partial(cnn, channels=[4] * 4), "cnn", (1, 8, 8), 10)


def test_the_initial_weights_are_the_seeds_and_seed_0_is_a_seed() -> None:
    build = ModelBuilder(mlp, "mlp", (1, 4, 4), 3)
    weights = [build(seed)[1].weight for seed in (0, 0, 1)]  # type: ignore[index]
    torch.rand(3)  # what else is drawn does not matter
    weights.append(build(0)[1].weight)  # type: ignore[index]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[3])
    assert not torch.equal(weights[0], weights[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert torch.equal(weights[0], mlp((1, 4, 4), 3)[1].weight)  # type: ignore[index]


@pytest.mark.usefixtures("untouched_randomness")
@pytest.mark.parametrize("make", SHIPPED)
def test_building_a_model_leaves_the_global_random_state_alone(make: Make) -> None:
    ModelBuilder(make, "shipped", (1, 4, 4), 3)(5)


def test_grey_pictures_are_shown_in_three_channels_to_a_model_that_takes_colour() -> None:
    assert ModelBuilder(resnet18, "resnet18", (1, 16, 16), 3).input_shape == (3, 16, 16)
    assert ModelBuilder(softmax_regression, "softmax_regression", (1, 16, 16), 3).input_shape == (1, 16, 16)


class Users(nn.Module):
    """A model that knows nothing of shapes."""

    def __init__(self, columns: int = 16, num_classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(columns, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.flatten(1))  # type: ignore[no-any-return]


def test_a_model_receives_the_shape_and_the_class_count_only_if_it_takes_them() -> None:
    assert ModelBuilder(Users, "users", (1, 4, 4), 5)(0).head.out_features == 5  # type: ignore[union-attr]
    assert ModelBuilder(lambda: Users(16, 3), "fixed", (1, 4, 4), 3)(0).head.out_features == 3  # type: ignore[union-attr]


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
def test_a_model_that_gives_no_logits_is_refused_in_one_line(make: Make, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as refused:
        ModelBuilder(make, "users", (1, 4, 4), 3)
    assert "\n" not in str(refused.value)
