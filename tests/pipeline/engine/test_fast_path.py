"""The dense fast path has the bits of autograd; other models, fused losses and autocast use autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pipeline.data.dataset import Dataset
from pipeline.engine.choose import fast_path_holds
from pipeline.engine.fold import DenseFastPath, dense_fast_path_of
from pipeline.engine.layers import fold_modules
from pipeline.engine.stack import Stack
from pipeline.models import cnn, mlp, softmax_regression
from pipeline.training.module import Recipe
from tests.laboratory import builder, recipe, same_bits, shipped, stack_of, toy_data, trained

Make = Callable[..., nn.Module]

DENSE: dict[str, Make] = {
    "softmax regression": softmax_regression,
    "mlp": partial(mlp, hidden=[16]),
    "three hidden layers": partial(mlp, hidden=[16, 8, 24]),
    "without biases": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)
    ),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
}
ARMS, SEEDS = ("nll", "ce", "kl"), (0, 3, 5, 6)


def assert_same_training(make: Make, data: Dataset, how: Recipe) -> None:
    """Bitwise equal weights and histories with the fast path and without."""
    fast, plain = (trained(builder(make, data), data, shipped(*ARMS), SEEDS, how, fast=fast) for fast in (True, False))
    assert fast.stack.fast_path is not None
    assert plain.stack.fast_path is None
    for replica in range(len(fast.replicas)):
        assert same_bits(fast.stack.weights(replica), plain.stack.weights(replica))
        assert fast.history(replica).equals(plain.history(replica))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", DENSE)
def test_fast_path_has_the_bits_of_autograd(name: str, optimizer: str, dtype: torch.dtype) -> None:
    """21 examples leave a short last batch."""
    data = toy_data(num_classes=4, train=21, dtype=dtype)
    assert_same_training(DENSE[name], data, recipe(make_optimizer=OPTIMIZERS[optimizer]))


def test_clipping_has_the_bits_of_autograd() -> None:
    assert_same_training(DENSE["mlp"], toy_data(num_classes=4, train=21), recipe(clip_norm=0.05))


def test_batch_of_one_has_the_bits_of_autograd() -> None:
    data = toy_data((1, 8, 8), num_classes=10, train=21)
    assert_same_training(partial(mlp, hidden=[128]), data, recipe(batch_size=10))


def test_nan_replica_keeps_the_bits_of_its_neighbours() -> None:
    data = toy_data(num_classes=4)

    def after_backward(poison: float) -> Stack:
        stack = stack_of(builder(DENSE["mlp"], data), SEEDS, "fold")
        logits = stack(stack.shared(data.take(torch.arange(8))[0])).logits
        upstream = torch.ones_like(logits)
        upstream[1] *= poison
        logits.backward(upstream)
        return stack

    healthy, poisoned = after_backward(1.0), after_backward(torch.nan)
    assert all(gradient.isnan().any() for gradient in poisoned.gradients_of(1).values())
    for replica in (0, 2, 3):
        assert healthy.gradients_of(replica)
        assert same_bits(healthy.gradients_of(replica), poisoned.gradients_of(replica))


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    module = mlp((1, 4, 4), 4, hidden=[8])
    change(module[1])
    return module


def tied() -> nn.Module:
    layer = nn.Linear(16, 16)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: mlp((1, 4, 4), 4, dropout=0.1),
    "batch norm": lambda: mlp((1, 4, 4), 4, batch_norm=True),
    "convolutions": lambda: cnn((1, 4, 4), 4),
    "another activation": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)),
    "two linear layers in a row": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 8), nn.ReLU()),
    "part of the picture": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(16, 4)),
    "a class of its own": lambda: type("Own", (nn.Sequential,), {})(nn.Flatten(), nn.Linear(16, 4)),
    "a hook": lambda: changed(lambda layer: layer.register_forward_hook(lambda *_: None)),
    "a frozen layer": lambda: changed(lambda layer: layer.requires_grad_(False)),
    "tied layers": tied,
    "nothing": nn.Sequential,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_use_autograd(name: str) -> None:
    assert dense_fast_path_of(fold_modules([OTHERS[name]()])) is None


def test_reparametrised_layer_uses_autograd() -> None:
    module = mlp((1, 4, 4), 4)
    weight_norm(module[1])
    assert dense_fast_path_of(module) is None


def test_fused_loss_and_autocast_use_autograd() -> None:
    data = toy_data(num_classes=4)
    build = builder(softmax_regression, data)
    assert stack_of(build, SEEDS, "fold", head="1").fast_path is None
    stack = stack_of(build, SEEDS, "fold")
    with torch.autocast("cpu", torch.bfloat16):
        assert stack(stack.shared(data.take(torch.arange(8))[0])).logits.dtype == torch.bfloat16


def test_check_requires_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [mlp((1, 4, 4), 4, hidden=[16]) for _ in range(5)]
    assert fast_path_holds(modules, (1, 4, 4), 16)
    assert not fast_path_holds([cnn((1, 4, 4), 4)], (1, 4, 4), 16)

    backward = DenseFastPath.backward

    def off_by_a_bit(self: DenseFastPath, upstream: Tensor) -> None:
        backward(self, upstream)
        gradient = self.layers[-1].weight.grad
        assert gradient is not None
        gradient.view(-1)[-1:] = torch.nextafter(gradient.view(-1)[-1:], torch.tensor(torch.inf))

    monkeypatch.setattr(DenseFastPath, "backward", off_by_a_bit)
    assert not fast_path_holds(modules, (1, 4, 4), 16)
