from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar

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
from tests.laboratory import CPU, formulation, largest_difference, stack_of

Make = Callable[..., nn.Module]
AnyModule = TypeVar("AnyModule", bound=nn.Module)

SEEDS = (0, 3, 5)
MODELS: dict[str, Make] = {
    "softmax regression": softmax_regression,
    "mlp": partial(mlp, hidden=[8, 8]),
    "mlp with batch norm": partial(mlp, hidden=[8, 8], batch_norm=True),
    "cnn": partial(cnn, channels=[4, 8], hidden=8),
    "resnet18": resnet18,
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
    """A network of eleven million parameters is tried with two replicas, the others with three."""
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


@cache
def after_backward(name: str, engine: str) -> Stack:
    stack = stack_of(build(name), seeds_of(build(name)), engine, torch.float64)
    backward(stack, *batches(build(name)))
    return stack


@cache
def plain_after_backward(name: str) -> list[nn.Module]:
    return plain_modules(build(name), *batches(build(name)))


def copied(module: AnyModule) -> AnyModule:
    """With its gradients, which `deepcopy` leaves behind."""
    made = copy.deepcopy(module)
    for ours, theirs in zip(made.parameters(), module.parameters(), strict=True):
        ours.grad = None if theirs.grad is None else theirs.grad.clone()
    return made


def gradients(stack: Stack) -> list[dict[str, Tensor]]:
    """Each replica's gradient, read off a step of plain SGD."""
    before = [stack.weights(r) for r in range(stack.num_replicas)]
    torch.optim.SGD(stack.parameters(), lr=1.0).step()
    after = [stack.parameters_of(r) for r in range(stack.num_replicas)]
    return [{name: b[name] - a[name].detach() for name in a} for b, a in zip(before, after, strict=True)]


def plain_gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_the_first_gradient_of_each_replica_is_that_of_its_plain_module(name: str, engine: str) -> None:
    stack = copied(after_backward(name, engine))
    for ours, plain in zip(gradients(stack), plain_after_backward(name), strict=True):
        assert largest_difference(ours, plain_gradients(plain)) <= 1e-12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_the_first_step_of_every_optimizer_is_that_on_the_plain_module(name: str, optimizer: str) -> None:
    """Adam divides a gradient by its own size: near 0, rounding grows by up to lr / eps = 1e5."""
    magnified = 0.0 if optimizer == "sgd" else 1e5
    plains = [copied(plain) for plain in plain_after_backward(name)]
    for plain, before in zip(plains, plain_after_backward(name), strict=True):
        OPTIMIZERS[optimizer](plain.parameters()).step()
        assert largest_difference(plain.state_dict(), before.state_dict()) > 1e-4
    for engine in ENGINES:
        stack = copied(after_backward(name, engine))
        rounding = max(map(largest_difference, gradients(copied(stack)), map(plain_gradients, plains)))
        OPTIMIZERS[optimizer](stack.parameters()).step()
        for replica, plain in enumerate(plains):
            drift = largest_difference(stack.weights(replica), plain.state_dict())
            assert drift <= (1e-12 + magnified * rounding if engine == "fold" else 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_a_replicas_weights_load_into_the_plain_module_and_give_the_same_outputs(name: str, engine: str) -> None:
    stack, inputs = copy.deepcopy(after_backward(name, engine)).eval(), batches(build(name))[0][0]
    together = stack(stack.shared(inputs)).logits
    plain = build(name)(99).double().eval()
    for replica, ours in enumerate(together):
        plain.load_state_dict(stack.weights(replica), strict=True)
        torch.testing.assert_close(ours, plain(inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_copies_and_parameters_of_are_not(engine: str) -> None:
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
def test_a_replicas_gradient_is_clipped_by_its_own_norm_as_torch_clips_one_model(engine: str, max_norm: float) -> None:
    builder = build("mlp")
    inputs, labels = batches(builder)
    inputs = inputs * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1, 1)  # norms of three magnitudes
    stack = stack_of(builder, SEEDS, engine, torch.float64)
    backward(stack, inputs, labels)
    norms = stack.gradient_norms()
    stack.clip_gradients(max_norm)
    plains = plain_modules(builder, inputs, labels)
    expected = [nn.utils.clip_grad_norm_(plain.parameters(), max_norm) for plain in plains]
    torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-12, atol=0)
    for ours, plain in zip(gradients(stack), plains, strict=True):
        assert largest_difference(ours, plain_gradients(plain)) <= 1e-12


@pytest.mark.parametrize("engine", ENGINES)
def test_a_replica_that_is_nan_leaves_its_neighbours_bits_alone_under_clipping(engine: str) -> None:
    builder = build("mlp with batch norm")
    inputs, labels = batches(builder)

    def clipped(poison: float) -> list[dict[str, Tensor]]:
        stack = stack_of(builder, SEEDS, engine, torch.float64)
        backward(stack, torch.cat([inputs[:1], inputs[1:2] * poison, inputs[2:]]), labels)
        stack.clip_gradients(0.1)
        return gradients(stack)

    healthy, sick = clipped(1.0), clipped(torch.nan)
    assert all(g.isnan().any() for g in sick[1].values())
    for replica in (0, 2):
        assert all(torch.equal(sick[replica][name], g) for name, g in healthy[replica].items())


# --- losses that take the last layer's input and weights


def fused_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """As the fused kernels do it: the logits are never handed over, and a chunk at a time."""
    chunks = zip(hidden.split(2), labels.split(2), strict=True)
    return sum(F.cross_entropy(F.linear(h, weight, bias), y, reduction="sum") for h, y in chunks) / len(labels)  # type: ignore[return-value]


FUSED = Formulation("fused", ("hidden", "weight", "bias", "labels"), lambda: fused_cross_entropy)
UNBIASED = Formulation(
    "unbiased", ("hidden", "weight", "labels"), lambda: lambda h, w, y: F.cross_entropy(h @ w.t(), y)
)
CE = formulation("ce", {"fn": {"_target_": "torch.nn.CrossEntropyLoss"}, "args": ["logits", "labels"]})


def headless(**given: object) -> nn.Module:
    """A network whose last layer has no bias."""
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fused_loss_gives_the_gradients_of_cross_entropy_on_the_plain_module(engine: str) -> None:
    """Beside an arm that takes logits, whose gradients it must leave alone too."""
    builder = build("cnn")
    inputs, labels = batches(builder)
    head = find_head(builder(0), torch.zeros(2, *builder.input_shape))
    assert head == "11"
    stack = stack_of(builder, SEEDS, engine, torch.float64, head)
    replicas = [Replica("fused", 0), Replica("fused", 3), Replica("ce", 5)]
    objectives = Objectives([FUSED, CE], replicas, 3, CPU, torch.float64)
    assert objectives.fused
    outputs = stack(inputs.movedim(0, stack.replica_axis).contiguous(), fused=True)
    torch.autograd.backward(objectives(outputs, labels, None))
    for ours, plain in zip(gradients(stack), plain_modules(builder, inputs, labels), strict=True):
        assert largest_difference(ours, plain_gradients(plain)) <= 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", [FUSED, UNBIASED], ids=["takes None", "takes no bias"])
def test_a_head_without_bias_serves_a_fused_loss(loss: Formulation, engine: str) -> None:
    builder = ModelBuilder(headless, "headless", (2, 6, 6), 3)
    inputs, labels = batches(builder)
    stack = stack_of(builder, SEEDS, engine, torch.float64, "3")
    objectives = Objectives([loss], [Replica(loss.name, seed) for seed in SEEDS], 3, CPU, torch.float64)
    outputs = stack(inputs.movedim(0, stack.replica_axis).contiguous(), fused=True)
    torch.autograd.backward(objectives(outputs, labels, None))
    for ours, plain in zip(gradients(stack), plain_modules(builder, inputs, labels), strict=True):
        assert largest_difference(ours, plain_gradients(plain)) <= 1e-12


class TwoHeads(nn.Module):
    """The logits are a sum of two linear layers: no one layer is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.a(inputs) + self.b(inputs)  # type: ignore[no-any-return]


def test_the_head_is_the_linear_layer_whose_output_is_the_models() -> None:
    assert find_head(resnet18(num_classes=3), torch.zeros(2, 3, 16, 16)) == "fc"
    assert find_head(TwoHeads(), torch.zeros(2, 4)) is None
    assert find_head(nn.Sequential(nn.Linear(4, 3), nn.Softplus()), torch.zeros(2, 4)) is None


def test_looking_for_the_head_leaves_the_module_as_it_was() -> None:
    module = build("mlp with batch norm")(0).train()
    before = copy.deepcopy(module.state_dict())
    find_head(module, torch.ones(2, 2, 6, 6))
    assert module.training
    assert not any(layer._forward_hooks for layer in module.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_narrow_convolutions_gain_from_channels_last_wide_and_dense_networks_do_not() -> None:
    assert gains_channels_last(cnn((1, 28, 28), 10))
    assert not gains_channels_last(resnet18())
    assert not gains_channels_last(mlp((1, 28, 28), 10))


def test_a_model_whose_parameters_have_hooks_is_not_folded() -> None:
    module = mlp((1, 4, 4), 4)
    next(module.parameters()).register_hook(lambda gradient: 2 * gradient)
    assert "hooks" in str(unfit_to_fold([module], (1, 4, 4), 8))
