from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from pipeline.engine.choose import build_stack
from pipeline.models import cnn, mlp, softmax_regression
from pipeline.replica import Replica
from pipeline.training.module import Divergence, Recipe, StackTrainingModule, evaluation_batches, fit
from pipeline.training.objectives import Formulation, Objectives
from tests.laboratory import (
    builder,
    largest_difference,
    recipe,
    same_bits,
    shipped,
    stack_of,
    toy_data,
    trained,
    trained_by_hand,
    weights_of,
)

Make = Callable[..., nn.Module]

ENGINES = ("fold", "loop")
MODELS: dict[str, Make] = {
    "softmax regression": softmax_regression,
    "mlp": partial(mlp, hidden=[8]),
    "mlp with batch norm and dropout": partial(mlp, hidden=[8, 8], batch_norm=True, dropout=0.3),
    "cnn": partial(cnn, channels=[4, 4], hidden=8),
    "cnn with dropout": partial(cnn, channels=[4], hidden=8, dropout=0.3),
}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.01)
FIFTY_STEPS = {"epochs": 25, "batch_size": 10}  # of 20 examples


def assert_as_by_hand(
    make: Make,
    engine: str,
    how: Recipe,
    arms: tuple[str, ...] = ("ce", "ce_one_hot"),
    factor: Any = lambda step: 1.0,
) -> None:
    """Trained side by side in float64, replicas end with the weights of plain modules trained alone."""
    data = toy_data((1, 6, 6), dtype=torch.float64)
    build = builder(make, data)
    module = trained(build, data, shipped(*arms), (0, 3), how, engine)
    for seed in (0, 3):
        plain = trained_by_hand(build(seed).double(), data, seed, how, factor=factor).state_dict()
        for arm in arms:
            assert largest_difference(weights_of(module, arm, seed), plain) <= 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_after_50_steps_a_replica_has_the_weights_of_a_plain_module_trained_alone(name: str, engine: str) -> None:
    assert_as_by_hand(MODELS[name], engine, recipe(**FIFTY_STEPS))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", [ADAM, ADAMW], ids=["adam", "adamw"])
def test_adam_keeps_its_state_for_each_replica(engine: str, optimizer: Any) -> None:
    assert_as_by_hand(MODELS["mlp"], engine, recipe(**FIFTY_STEPS, make_optimizer=optimizer))


@pytest.mark.parametrize("engine", ENGINES)
def test_clipping_is_that_of_torch_on_each_plain_module(engine: str) -> None:
    assert_as_by_hand(MODELS["mlp"], engine, recipe(**FIFTY_STEPS, clip_norm=0.3))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_short_last_batch_is_trained_on_as_it_is(engine: str) -> None:
    assert_as_by_hand(MODELS["mlp"], engine, recipe(epochs=4, batch_size=8))


@pytest.mark.parametrize("inner_steps", [1, 7, 1000])
def test_how_many_steps_lightning_sees_at_once_changes_nothing(inner_steps: int) -> None:
    assert_as_by_hand(MODELS["mlp"], "fold", recipe(epochs=3, batch_size=4, inner_steps=inner_steps))


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "factor"),
    [
        ("constant", 7, lambda step: min(1.0, (step + 1) / 7)),
        ("cosine", 0, lambda step: (1 + math.cos(math.pi * step / 50)) / 2),
        ("cosine", 5, lambda step: min(1.0, (step + 1) / 5) * (1 + math.cos(math.pi * step / 50)) / 2),
    ],
    ids=["warm-up", "cosine", "both"],
)
def test_a_schedule_is_that_of_torchs_lambda_lr(schedule: str, warmup_steps: int, factor: Any) -> None:
    how = recipe(**FIFTY_STEPS, schedule=schedule, warmup_steps=warmup_steps)
    assert_as_by_hand(MODELS["mlp"], "fold", how, factor=factor)
    assert_as_by_hand(MODELS["mlp"], "loop", how, factor=factor)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", [SGD, ADAM, ADAMW], ids=["sgd", "adam", "adamw"])
def test_a_loss_s_own_rate_is_that_rate_and_no_neighbour_s(engine: str, optimizer: Any) -> None:
    data = toy_data((1, 6, 6), dtype=torch.float64)
    build = builder(MODELS["mlp"], data)
    how = recipe(**FIFTY_STEPS, make_optimizer=optimizer, schedule="cosine")
    (plain,) = shipped("ce")
    arms = (plain, replace(plain, name="slower", lr_scale=0.25))
    module = trained(build, data, arms, (0, 3), how, engine)
    alone = trained(build, data, [plain], (0, 3), how, engine)
    quarter = partial(optimizer, lr=optimizer.keywords["lr"] / 4)
    slow = trained(build, data, [plain], (0, 3), replace(how, make_optimizer=quarter), engine)
    for seed in (0, 3):
        assert same_bits(weights_of(module, "ce", seed), weights_of(alone, "ce", seed))
        mine, expected = weights_of(module, "slower", seed), weights_of(slow, "ce", seed)
        assert (
            largest_difference(mine, expected) <= 1e-12 < 1e-6 < largest_difference(mine, weights_of(alone, "ce", seed))
        )


def nudged(module: nn.Module) -> nn.Module:
    """The same module with every parameter moved by a unit in the last place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.nextafter(torch.full_like(parameter, math.inf)))
    return module


def test_folded_resnet18_drifts_at_most_ten_times_as_far_as_one_unit_in_the_last_place_moves_it() -> None:
    """Six steps, folded; the loop, in which it runs on a CPU, is the plain module bit for bit."""
    data = toy_data((3, 8, 8), train=24, dtype=torch.float64)
    build = builder(resnet18, data)
    how = recipe(epochs=2, batch_size=8, make_optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9))
    module = trained(build, data, shipped("ce"), (0, 3), how, "fold")
    plain = trained_by_hand(build(3).double(), data, 3, how).state_dict()
    moved = trained_by_hand(nudged(build(3).double()), data, 3, how).state_dict()
    drift = largest_difference(weights_of(module, "ce", 3), plain)
    assert drift <= 10 * largest_difference(moved, plain)


# --- precision


def precision_of(dtype: torch.dtype, autocast: bool, engine: str) -> tuple[StackTrainingModule, set[torch.dtype]]:
    data = toy_data(dtype=dtype)
    seen: set[torch.dtype] = set()

    class Spy(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            seen.add(hidden.dtype)
            return hidden

    def make(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Spy(), nn.BatchNorm1d(8), nn.Linear(8, num_classes))

    build = builder(make, data)
    seen.clear()
    return trained(build, data, shipped("ce", "nll", "kl"), (0, 3), recipe(autocast=autocast), engine), seen


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("dtype", "autocast", "inside"),
    [
        (torch.float32, False, torch.float32),
        (torch.float64, False, torch.float64),
        (torch.float32, True, torch.bfloat16),
    ],
    ids=["float32", "float64", "bf16_mixed"],
)
def test_precision_is_that_of_the_weights_and_of_what_the_layers_give(
    dtype: torch.dtype, autocast: bool, inside: torch.dtype, engine: str
) -> None:
    module, seen = precision_of(dtype, autocast, engine)
    assert seen == {inside}
    assert {parameter.dtype for parameter in module.stack.parameters()} == {dtype}
    assert {t.dtype for t in weights_of(module, "ce", 0).values()} == {dtype, torch.int64}
    assert all(module.history(replica)["value"].notna().all() for replica in range(6))
    assert list(module.divergences()) == [None] * 6


# --- what is measured


def small(*arms: str, how: Recipe | None = None, engine: str = "fold") -> StackTrainingModule:
    data = toy_data()
    return trained(builder(MODELS["mlp"], data), data, shipped(*arms), (0, 3), how or recipe(), engine)


def test_the_history_has_the_yardsticks_of_every_epoch_and_of_the_end() -> None:
    history = small("ce").history(1)
    names = ["nll", "accuracy", "brier", "ece"]
    steps = history.groupby("metric")["step"].agg(list).to_dict()
    assert steps == {
        "train/objective": [4, 8],
        **{f"val/{name}": [4, 8] for name in names},
        **{f"{split}/{name}": [8] for split in ("train", "test") for name in names},
    }
    assert history.dtypes.astype(str).to_dict() == {"metric": "str", "step": "int64", "value": "float64"}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_yardsticks_are_those_of_the_replica_in_evaluation(engine: str) -> None:
    data = toy_data(dtype=torch.float64)
    build = builder(MODELS["mlp with batch norm and dropout"], data)
    module = trained(build, data, shipped("nll", "brier"), (0, 3), recipe(), engine)
    plain = build(99).double().eval()
    for replica in range(4):
        plain.load_state_dict(module.stack.weights(replica))
        values = module.history(replica).groupby("metric")["value"].last()
        for split in ("train", "val", "test"):
            inputs, labels = data.take(data.splits[split])
            logits = plain(inputs)
            assert values[f"{split}/nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-9)
            assert values[f"{split}/accuracy"] == (logits.argmax(1) == labels).double().mean().item()


def test_the_objective_of_an_epoch_is_a_mean_over_examples_not_over_batches() -> None:
    """Batches of 16 and 4, and weights that do not move."""
    data = toy_data()
    build = builder(MODELS["mlp"], data)
    still = recipe(epochs=1, batch_size=16, make_optimizer=partial(torch.optim.SGD, lr=0.0))
    history = trained(build, data, shipped("ce"), (0,), still).history(0)
    inputs, labels = data.take(data.splits["train"])
    expected = F.cross_entropy(build(0)(inputs), labels).item()
    assert history.set_index("metric")["value"]["train/objective"] == pytest.approx(expected, rel=1e-6)


def test_the_latest_value_of_an_arm_is_the_mean_of_its_replicas() -> None:
    module = small("ce", "brier")
    values = [module.history(r).groupby("metric")["value"].last()["val/nll"] for r in range(4)]
    expected = {"ce": sum(values[:2]) / 2, "brier": sum(values[2:]) / 2}
    assert module.latest("val/nll") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sketch_of_the_weights_is_kept_at_1_3_10_and_the_end(engine: str) -> None:
    module = small("ce", "kl", how=recipe(epochs=3), engine=engine)
    assert module.sketch_steps == [1, 3, 10, 12]
    assert len(module.sketches) == 4
    last = torch.cat([t.flatten() for t in module.stack.parameters_of(1).values()]).double()
    assert torch.equal(module.sketches[-1][1], last)


def test_what_reached_a_loss_is_kept_without_its_neighbours() -> None:
    """torch saves the whole storage of a part of a tensor: a cell would hold what reached every replica."""
    tensors = [batch[name] for batch in small("ce", "kl").batches(1) for name in ("logits", "labels")]
    assert len(tensors) == 2 * 4
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_a_training_that_ends_too_early_is_an_error() -> None:
    """Lightning takes a StopIteration from anywhere for the end of the training."""

    class Stopping(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> None:
            self.calls += 1
            if self.calls == 7:
                raise StopIteration

    with pytest.raises(RuntimeError, match="training ended after 7 of 8 steps"):
        small("ce", how=recipe(make_optimizer=partial(Stopping, lr=0.1)))


# --- divergence


def test_an_arm_that_is_nan_diverges_at_its_first_step_and_is_named() -> None:
    first = Divergence(1, "the objective is not finite")
    assert list(small("ce", "kl_literal").divergences()) == [None, None, first, first]


def test_an_arm_whose_weights_overflow_only_at_the_end_is_found_too() -> None:
    how = recipe(epochs=1, batch_size=20, make_optimizer=partial(torch.optim.SGD, lr=math.inf))
    assert list(small("ce", how=how).divergences()) == [Divergence(1, "the weights are not finite")] * 2


def test_a_divergence_later_on_is_dated() -> None:
    how = recipe(epochs=1, batch_size=4, make_optimizer=partial(torch.optim.SGD, lr=1e30))
    found = list(small("ce", how=how).divergences())
    assert all(d is not None and 1 < d.step <= 5 and d.cause == "the objective is not finite" for d in found)


# --- the laid-out data


def test_grey_pictures_are_repeated_where_the_model_takes_colour() -> None:
    data = toy_data((1, 4, 4), dtype=torch.float64)

    def colour(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, num_classes))

    build = builder(colour, data)
    assert build.input_shape == (3, 4, 4)
    for engine in ENGINES:
        trained(build, data, shipped("ce"), (0, 3), recipe(), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_batch_is_laid_out_for_all_replicas_without_a_copy(engine: str) -> None:
    data = toy_data()
    stack = stack_of(builder(MODELS["mlp"], data), (0, 3, 5), engine)
    inputs, _ = data.take(data.splits["val"])
    shared = stack.shared(inputs)
    assert shared.data_ptr() == inputs.data_ptr()
    assert shared.shape[stack.replica_axis] == 3
    assert torch.equal(shared.select(stack.replica_axis, 2), inputs)


def test_channels_last_a_cnn_is_trained_to_the_same_weights_but_for_rounding() -> None:
    how = recipe(epochs=5, batch_size=10)
    data = toy_data((2, 8, 8), dtype=torch.float64)
    build = builder(partial(cnn, channels=[4, 8], hidden=8), data)
    stack = build_stack("loop", [build(3).double()], [3], fast=True).train()
    assert next(stack.parameters()).is_contiguous(memory_format=torch.channels_last)
    replicas = [Replica("ce", 3)]
    objectives = Objectives(shipped("ce"), replicas, data.num_classes, torch.device("cpu"), data.dtype)
    module = StackTrainingModule(stack, objectives, replicas, data, build.input_shape, how)
    fit(module, (), "cpu")
    plain = trained_by_hand(build(3).double(), data, 3, how).state_dict()
    assert largest_difference(stack.weights(0), plain) <= 1e-12


def interrupting(step: int, act: Callable[[], None]) -> Formulation:
    """Cross-entropy that does something at its call of that number."""
    calls = iter(range(1, 10**6))

    def fn(logits: Tensor, labels: Tensor) -> Tensor:
        if next(calls) == step:
            act()
        return F.cross_entropy(logits, labels)

    return Formulation("ce", ("logits", "labels"), lambda: fn)


def test_a_request_to_end_is_an_interrupt_and_no_end_of_the_training() -> None:
    data = toy_data()
    ended = interrupting(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        trained(builder(softmax_regression, data), data, [ended], (0,), recipe(epochs=3))


def test_a_loss_that_exits_fails_alone() -> None:
    data = toy_data()
    module = trained(builder(softmax_regression, data), data, [interrupting(4, sys.exit)], (0,), recipe(epochs=3))
    (divergence,) = module.divergences()
    assert divergence is not None
    assert divergence.cause.startswith("the loss raised SystemExit")


def test_a_loss_that_overwrites_labels_behind_torchs_back_reaches_no_neighbour() -> None:
    def overwriting(logits: Tensor, labels: Tensor) -> Tensor:
        labels.data.zero_()
        return F.cross_entropy(logits, labels)

    data = toy_data()
    build = builder(softmax_regression, data)
    first = Formulation("a", ("logits", "labels"), lambda: overwriting)
    alone = trained(build, data, shipped("ce"), (0,), recipe())
    beside = trained(build, data, [first, *shipped("ce")], (0,), recipe())
    assert same_bits(weights_of(alone, "ce", 0), weights_of(beside, "ce", 0))


@pytest.mark.parametrize("count", [1, 2, 499, 500, 501, 1000, 1001, 1500, 2501])
def test_evaluation_leaves_no_example_alone(count: int) -> None:
    batches = evaluation_batches(torch.arange(count))
    assert torch.equal(torch.cat(batches), torch.arange(count))
    assert count == 1 or min(map(len, batches)) > 1
    assert count % 500 == 1 or len(batches[0]) == min(count, 500)
