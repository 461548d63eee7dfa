"""The stack equals R plain modules in both engines: gradients, optimizer steps, weights, clipping, fused losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from pipeline.engine.choose import find_head, gains_channels_last, unfit_to_fold
from pipeline.engine.stack import Stack
from pipeline.models import ModelBuilder, cnn, mlp, softmax_regression
from pipeline.replica import Replica
from pipeline.training.objectives import Formulation, Objectives
from tests.laboratory import CPU, largest_difference, shipped, stack_of

Make = Callable[..., nn.Module]

SEEDS = (0, 3, 5)
MODELS: dict[str, Make] = {
    "softmax regression": softmax_regression,
    "mlp": partial(mlp, hidden=[8, 8]),
    "mlp with batch norm": partial(mlp, hidden=[8, 8], batch_norm=True),
    "cnn": partial(cnn, channels=[4, 8], hidden=8),
    "resnet18": resnet18,
    "head without bias": lambda **_: nn.Sequential(
        nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)
    ),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.001),
    "adamw": partial(torch.optim.AdamW, lr=0.001, weight_decay=0.01),
}
ENGINES = ("fold", "loop")


@cache
def build(name: str) -> ModelBuilder:
    shape = (3, 8, 8) if name == "resnet18" else (2, 6, 6)
    return ModelBuilder(MODELS[name], name, shape, 3)


def seeds_of(builder: ModelBuilder) -> tuple[int, ...]:
    """Two seeds for ResNet-18 with its eleven million parameters, three for the others."""
    return SEEDS[:2] if builder.name == "resnet18" else SEEDS


def batches(builder: ModelBuilder, size: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs [R, B, ...] in float64 and labels [R, B], every replica its own."""
    generator, replicas = torch.Generator().manual_seed(1), len(seeds_of(builder))
    inputs = torch.randn(replicas, size, *builder.input_shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(builder.num_classes, (replicas, size), generator=generator)


def backward(stack: Stack, inputs: Tensor, labels: Tensor) -> None:
    logits = stack(inputs.movedim(0, stack.replica_axis)).logits
    torch.autograd.backward([F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)])


def plain_modules(builder: ModelBuilder, inputs: Tensor, labels: Tensor) -> list[nn.Module]:
    """Separate modules after a backward pass each."""
    modules = [builder(seed).double().train() for seed in seeds_of(builder)]
    for module, x, y in zip(modules, inputs, labels, strict=True):
        F.cross_entropy(module(x), y).backward()
    return modules


def gradient_error(stack: Stack, plains: list[nn.Module]) -> float:
    """The largest difference between a replica's gradients and those of its plain module."""
    expected = [{name: p.grad for name, p in plain.named_parameters()} for plain in plains]
    return max(largest_difference(stack.gradients_of(replica), plain) for replica, plain in enumerate(expected))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(name, optimizer) for name in MODELS for optimizer in OPTIMIZERS if name != "resnet18" or optimizer == "sgd"],
)
def test_first_step_equals_that_of_plain_modules(name: str, optimizer: str) -> None:
    """Adam divides a gradient by its own size: near 0, rounding grows by up to lr / eps = 1e5."""
    magnified = 0.0 if optimizer == "sgd" else 1e5
    make, batch = build(name), batches(build(name))
    plains = plain_modules(make, *batch)
    stacks = {engine: stack_of(make, seeds_of(make), engine, torch.float64) for engine in ENGINES}
    rounding = 0.0
    for stack in stacks.values():
        backward(stack, *batch)
        rounding = max(rounding, gradient_error(stack, plains))
        assert rounding <= 1e-12
        OPTIMIZERS[optimizer](stack.parameters()).step()
    for replica, plain in enumerate(plains):
        before = copy.deepcopy(plain.state_dict())
        OPTIMIZERS[optimizer](plain.parameters()).step()
        assert largest_difference(plain.state_dict(), before) > 1e-4
        assert largest_difference(stacks["loop"].weights(replica), plain.state_dict()) == 0
        drift = largest_difference(stacks["fold"].weights(replica), plain.state_dict())
        assert drift <= 1e-12 + magnified * rounding


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_weights_load_into_the_plain_module(name: str, engine: str) -> None:
    make = build(name)
    stack, (inputs, labels) = stack_of(make, seeds_of(make), engine, torch.float64), batches(make)
    backward(stack, inputs, labels)  # moves the running statistics
    together = stack.eval()(stack.shared(inputs[0])).logits
    plain = make(99).double().eval()
    for replica, ours in enumerate(together):
        plain.load_state_dict(stack.weights(replica), strict=True)
        torch.testing.assert_close(ours, plain(inputs[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_copies_and_parameters_are_not(engine: str) -> None:
    stack = stack_of(build("mlp with batch norm"), SEEDS, engine)
    copies, views = stack.weights(1), stack.parameters_of(1)
    assert views.keys() < copies.keys()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.zero_()
    assert all(not view.any() for view in views.values())
    assert copies["1.weight"].any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e3])
def test_clipping_equals_torchs_on_each_plain_module(engine: str, max_norm: float) -> None:
    inputs, labels = batches(build("mlp"))
    inputs = inputs * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1, 1)  # norms of three magnitudes
    stack = stack_of(build("mlp"), SEEDS, engine, torch.float64)
    backward(stack, inputs, labels)
    norms = stack.gradient_norms()
    stack.clip_gradients(max_norm)
    plains = plain_modules(build("mlp"), inputs, labels)
    expected = [nn.utils.clip_grad_norm_(plain.parameters(), max_norm) for plain in plains]
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-12, atol=0)
    assert gradient_error(stack, plains) <= 1e-12


# --- losses that take the last layer's input and weights


def fused_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Like the fused kernels: it takes no logits, and works on one chunk at a time."""
    chunks = zip(hidden.split(2), labels.split(2), strict=True)
    return sum(F.cross_entropy(F.linear(h, weight, bias), y, reduction="sum") for h, y in chunks) / len(labels)


FUSED = Formulation("fused", ("hidden", "weight", "bias", "labels"), lambda: fused_cross_entropy)
UNBIASED = Formulation(
    "unbiased", ("hidden", "weight", "labels"), lambda: lambda h, w, y: F.cross_entropy(h @ w.t(), y)
)
(CE,) = shipped("ce")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "head", "arms"),
    [
        ("cnn", "11", [FUSED, CE]),
        ("head without bias", "3", [FUSED]),
        ("head without bias", "3", [UNBIASED]),
    ],
    ids=["beside ce", "takes None", "takes no bias"],
)
def test_fused_loss_has_the_gradients_of_cross_entropy(
    name: str, head: str, arms: list[Formulation], engine: str
) -> None:
    """Also a loss of the logits beside it keeps its gradients."""
    make = build(name)
    inputs, labels = batches(make)
    assert find_head(make(0), torch.zeros(2, *make.input_shape)) == head
    stack = stack_of(make, SEEDS, engine, torch.float64, head)
    replicas = [Replica(arms[0].name, 0), Replica(arms[0].name, 3), Replica(arms[-1].name, 5)]
    objectives = Objectives(arms, replicas, 3, CPU, torch.float64)
    assert objectives.fused
    outputs = stack(inputs.movedim(0, stack.replica_axis).contiguous(), fused=True)
    torch.autograd.backward(objectives(outputs, labels, None))
    assert gradient_error(stack, plain_modules(make, inputs, labels)) <= 1e-12


class TwoHeads(nn.Module):
    """The logits are a sum of two linear layers, so no layer is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.a(inputs) + self.b(inputs)


def test_head_is_the_layer_whose_output_is_the_models() -> None:
    assert find_head(resnet18(num_classes=3), torch.zeros(2, 3, 16, 16)) == "fc"
    assert find_head(TwoHeads(), torch.zeros(2, 4)) is None
    assert find_head(nn.Sequential(nn.Linear(4, 3), nn.Softplus()), torch.zeros(2, 4)) is None


def test_find_head_does_not_change_the_module() -> None:
    module = build("mlp with batch norm")(0).train()
    before = copy.deepcopy(module.state_dict())
    find_head(module, torch.ones(2, 2, 6, 6))
    assert module.training
    assert not any(layer._forward_hooks for layer in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_only_narrow_convolutions_gain_from_channels_last() -> None:
    assert gains_channels_last(cnn((1, 28, 28), 10))
    assert not gains_channels_last(resnet18())
    assert not gains_channels_last(mlp((1, 28, 28), 10))


def test_model_with_parameter_hooks_is_not_folded() -> None:
    module = mlp((1, 4, 4), 4)
    next(module.parameters()).register_hook(lambda gradient: 2 * gradient)
    assert "hooks" in str(unfit_to_fold([module], (1, 4, 4), 8))
