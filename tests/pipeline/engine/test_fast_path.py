from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pipeline.engine.choose import fast_path_holds
from pipeline.engine.fold import DenseFastPath, Fold, dense_fast_path_of
from pipeline.engine.layers import fold_modules
from pipeline.models import cnn, mlp, softmax_regression
from tests.laboratory import builder, recipe, same_bits, shipped, stack_of, toy_data, trained, weights_of

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


def both_ways(make: Make, dtype: torch.dtype, **how: Any) -> tuple[Any, Any]:
    """The same training with the fast path and without; 21 examples leave a short last batch."""
    data = toy_data(num_classes=4, train=21, dtype=dtype)
    fast, plain = (
        trained(builder(make, data), data, shipped(*ARMS), SEEDS, recipe(**how), fast=fast) for fast in (True, False)
    )
    assert fast.stack.fast_path is not None
    assert plain.stack.fast_path is None
    return fast, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", DENSE)
def test_a_training_has_the_same_bits_with_the_fast_path_and_without(
    name: str, optimizer: str, dtype: torch.dtype
) -> None:
    fast, plain = both_ways(DENSE[name], dtype, make_optimizer=OPTIMIZERS[optimizer])
    for arm in ARMS:
        for seed in SEEDS:
            assert same_bits(weights_of(fast, arm, seed), weights_of(plain, arm, seed))
    assert fast.history(5).equals(plain.history(5))


def test_gradients_are_clipped_as_autograd_would_have_left_them() -> None:
    fast, plain = both_ways(DENSE["mlp"], torch.float32, clip_norm=0.05)
    assert same_bits(weights_of(fast, "ce", 3), weights_of(plain, "ce", 3))


def test_a_replica_that_becomes_nan_leaves_its_neighbours_bits_alone() -> None:
    data = toy_data(num_classes=4)
    make = builder(partial(mlp, hidden=[16]), data)

    def after_a_step(poison: bool) -> Fold:
        stack = stack_of(make, SEEDS, "fold")
        assert isinstance(stack, Fold)
        logits = stack(stack.shared(data.take(torch.arange(8))[0])).logits
        upstream = torch.ones_like(logits)
        upstream[1] *= torch.nan if poison else 1
        logits.backward(upstream)
        return stack

    healthy, poisoned = after_a_step(False), after_a_step(True)
    for exact, ours in zip(healthy.parameters(), poisoned.parameters(), strict=True):
        assert exact.grad is not None
        assert ours.grad is not None
        assert ours.grad[1].isnan().any()
        for replica in (0, 2, 3):
            assert torch.equal(ours.grad[replica], exact.grad[replica])


def hooked() -> nn.Module:
    module = mlp((1, 4, 4), 4, hidden=[8])
    module[1].register_forward_hook(lambda *_: None)  # type: ignore[index]
    return module


def frozen() -> nn.Module:
    module = mlp((1, 4, 4), 4, hidden=[8])
    next(module.parameters()).requires_grad_(False)
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
    "a hook": hooked,
    "a frozen layer": frozen,
    "tied layers": tied,
    "nothing": nn.Sequential,
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_model_keeps_to_autograd(name: str) -> None:
    assert dense_fast_path_of(fold_modules([OTHERS[name]()])) is None


def test_a_reparametrised_layer_is_no_dense_layer() -> None:
    module = mlp((1, 4, 4), 4)
    weight_norm(module[1])  # type: ignore[index]
    assert dense_fast_path_of(module) is None


def test_a_fused_loss_keeps_to_autograd() -> None:
    data = toy_data(num_classes=4)
    stack = stack_of(builder(softmax_regression, data), SEEDS, "fold", head="1")
    assert isinstance(stack, Fold)
    assert stack.fast_path is None


def test_under_autocast_autograd_does_it() -> None:
    data = toy_data(num_classes=4)
    stack = stack_of(builder(softmax_regression, data), SEEDS, "fold")
    inputs = stack.shared(data.take(torch.arange(8))[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert stack(inputs).logits.dtype == torch.bfloat16


def modules() -> list[nn.Module]:
    return [mlp((1, 4, 4), 4, hidden=[16]) for _ in range(5)]


def test_the_check_passes_what_has_the_same_bits_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_path_holds(modules(), (1, 4, 4), 16)
    assert not fast_path_holds([cnn((1, 4, 4), 4)], (1, 4, 4), 16)

    backward = DenseFastPath.backward

    def off_by_a_bit(self: DenseFastPath, upstream: Tensor) -> None:
        backward(self, upstream)
        gradient = self.layers[-1].weight.grad
        assert gradient is not None
        gradient.view(-1)[-1:] = torch.nextafter(gradient.view(-1)[-1:], torch.tensor(torch.inf))

    monkeypatch.setattr(DenseFastPath, "backward", off_by_a_bit)
    assert not fast_path_holds(modules(), (1, 4, 4), 16)


def test_a_batch_of_one_has_autograds_bits_too() -> None:
    data = toy_data((1, 8, 8), num_classes=10, train=21)
    build = builder(partial(mlp, hidden=[128]), data)
    fast, plain = (
        trained(build, data, shipped(*ARMS), SEEDS, recipe(batch_size=10), fast=fast) for fast in (True, False)
    )
    for seed in SEEDS:
        assert same_bits(weights_of(fast, "ce", seed), weights_of(plain, "ce", seed))
