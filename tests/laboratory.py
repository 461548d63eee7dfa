"""Helpers for tests: toy data, the shipped losses, training of a stack, and the same training in a plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from likelihood_lab.errors import UsageError
from pipeline.data.dataset import Dataset, make_dataset
from pipeline.engine.choose import build_stack
from pipeline.engine.seeding import derive_seed
from pipeline.engine.stack import Stack
from pipeline.models import ModelBuilder
from pipeline.replica import Replica
from pipeline.training.module import Recipe, StackTrainingModule, fit
from pipeline.training.objectives import Formulation, Objectives

LOSSES = Path(__file__).parents[1] / "conf" / "loss"
CPU = torch.device("cpu")

Weights = dict[str, Tensor]


def toy_data(
    shape: tuple[int, int, int] = (1, 4, 4), *, num_classes: int = 3, train: int = 20, dtype: Any = torch.float32
) -> Dataset:
    """`train` random training pictures, and 8 each for validation and test, with every class in each."""
    generator = torch.Generator().manual_seed(0)
    count = train + 16
    images = torch.rand(count, *shape, generator=generator)
    splits = {"train": range(train), "val": range(train, train + 8), "test": range(train + 8, count)}
    labels = torch.arange(count).numpy() % num_classes
    made = make_dataset("toy", images, labels, {k: list(v) for k, v in splits.items()}, [*"abcdefghij"][:num_classes])
    return made.to(CPU, dtype)


def builder(make: Callable[..., nn.Module], data: Dataset) -> ModelBuilder:
    return ModelBuilder(make, "toy", data.input_shape, data.num_classes)


def shipped(*names: str) -> list[Formulation]:
    """Losses as `conf/loss/` declares them; all of them if none is named."""
    chosen = {name: declared()[name] for name in names or declared()}
    return [
        Formulation(name, tuple(loss["args"]), partial(instantiate, loss["fn"], _convert_="all"))
        for name, loss in chosen.items()
    ]


@cache
def declared() -> dict[str, Any]:
    return {path.stem: yaml.safe_load(path.read_text())[path.stem] for path in sorted(LOSSES.glob("*.yaml"))}


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def recipe(**changes: Any) -> Recipe:
    return Recipe(**({"epochs": 2, "batch_size": 6, "make_optimizer": sgd, "inner_steps": 3} | changes))


def stack_of(
    build: ModelBuilder,
    seeds: Sequence[int],
    engine: str,
    dtype: torch.dtype = torch.float32,
    head: str | None = None,
    fast: bool = True,
) -> Stack:
    modules = [build(seed).to(dtype) for seed in seeds]
    return build_stack(engine, modules, seeds, head, fast and engine == "fold").train()


def untrained(
    build: ModelBuilder,
    data: Dataset,
    arms: Sequence[Formulation],
    seeds: Sequence[int],
    how: Recipe,
    engine: str = "fold",
    head: str | None = None,
    fast: bool = True,
) -> StackTrainingModule:
    """The training module of a stack of every (loss, seed), not yet trained."""
    replicas = [Replica(arm.name, seed) for arm in arms for seed in seeds]
    stack = stack_of(build, [replica.seed for replica in replicas], engine, data.dtype, head, fast)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="reduction: 'mean' divides the total loss")  # kl_mean's very point
        objectives = Objectives(arms, replicas, data.num_classes, CPU, data.dtype)
    return StackTrainingModule(stack, objectives, replicas, data, build.input_shape, how)


def trained(*arguments: Any, **options: Any) -> StackTrainingModule:
    """The training module of `untrained`, after training."""
    module = untrained(*arguments, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="reduction: 'mean' divides the total loss")
        # Lightning 2.6 uses a class that torch 2.14 has deprecated.
        warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
        fit(module, (), "cpu")
    return module


def weights_of(module: StackTrainingModule, arm: str, seed: int) -> Weights:
    return module.stack.weights(module.replicas.index(Replica(arm, seed)))


def trained_by_hand(
    module: nn.Module,
    data: Dataset,
    seed: int,
    how: Recipe,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> nn.Module:
    """Train one plain module in an ordinary loop: permutation, `backward`, clip, step, schedule."""
    optimizer = how.make_optimizer(module.train().parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        for epoch in range(how.epochs):
            order = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            train = data.splits["train"]
            for batch in train[torch.randperm(len(train), generator=order)].split(how.batch_size):
                inputs, labels = data.take(batch)
                optimizer.zero_grad()
                F.cross_entropy(module(inputs), labels).backward()
                if how.clip_norm is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), how.clip_norm)
                optimizer.step()
                schedule.step()
    return module


def same_bits(a: Weights, b: Weights) -> bool:
    """True if every tensor is equal bit for bit, NaN included."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(_bytes(a[name]), _bytes(b[name])) for name in a
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def largest_difference(a: Weights, b: Weights) -> float:
    """The largest absolute difference, in units of the largest entry of its tensor where that exceeds 1."""
    assert a.keys() == b.keys()
    return max(
        ((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1)).item()
        for name in a
        if a[name].is_floating_point()
    )


def refused(what: Callable[[], object], *words: str) -> None:
    """Check that `what()` raises a UsageError of one line that contains all `words`."""
    with pytest.raises(UsageError) as caught:
        what()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line
