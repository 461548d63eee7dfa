"""Training of a stack: the weights of plain modules, precision, measurements, divergence, and interruption."""

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
from pipeline.training.module import Divergence, Recipe, StackTrainingModule, evaluation_batches, fit
from pipeline.training.objectives import Formulation
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
    untrained,
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
FIFTY_STEPS: dict[str, Any] = {"epochs": 25, "batch_size": 10}  # of 20 examples


def cosine(step: int) -> float:
    return (1 + math.cos(math.pi * step / 50)) / 2


def constant(step: int) -> float:
    return 1.0


TRAININGS: dict[str, tuple[str, dict[str, Any], Callable[[int], float]]] = {
    **{name: (name, FIFTY_STEPS, constant) for name in MODELS},
    "adam": ("mlp", FIFTY_STEPS | {"make_optimizer": ADAM}, constant),
    "adamw": ("mlp", FIFTY_STEPS | {"make_optimizer": ADAMW}, constant),
    "clipping": ("mlp", FIFTY_STEPS | {"clip_norm": 0.3}, constant),
    "short last batch": ("mlp", {"epochs": 4, "batch_size": 8}, constant),
    **{f"{n} inner steps": ("mlp", {"epochs": 3, "batch_size": 4, "inner_steps": n}, constant) for n in (1, 7, 1000)},
    "warm-up": ("mlp", FIFTY_STEPS | {"warmup_steps": 7}, lambda step: min(1.0, (step + 1) / 7)),
    "cosine": ("mlp", FIFTY_STEPS | {"schedule": "cosine"}, cosine),
    "warm-up and cosine": (
        "mlp",
        FIFTY_STEPS | {"schedule": "cosine", "warmup_steps": 5},
        lambda step: min(1.0, (step + 1) / 5) * cosine(step),
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", TRAININGS)
def test_replica_has_the_weights_of_a_plain_module(training: str, engine: str) -> None:
    """In float64, against a plain loop with torch's optimizer, clipping and LambdaLR."""
    name, settings, factor = TRAININGS[training]
    data, how = toy_data((1, 6, 6), dtype=torch.float64), recipe(**settings)
    build = builder(MODELS[name], data)
    module = trained(build, data, shipped("ce", "ce_one_hot"), (0, 3), how, engine)
    for replica in module.replicas:
        plain = trained_by_hand(build(replica.seed).double(), data, replica.seed, how, factor).state_dict()
        assert largest_difference(weights_of(module, replica.arm, replica.seed), plain) <= 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", [SGD, ADAM, ADAMW], ids=["sgd", "adam", "adamw"])
def test_lr_scale_changes_only_its_own_loss(engine: str, optimizer: Any) -> None:
    data = toy_data((1, 6, 6), dtype=torch.float64)
    (plain,) = shipped("ce")
    how = recipe(epochs=10, batch_size=10, make_optimizer=optimizer, schedule="cosine")
    quarter = replace(how, make_optimizer=partial(optimizer, lr=optimizer.keywords["lr"] / 4))

    def train(how: Recipe, *arms: Formulation) -> StackTrainingModule:
        return trained(builder(MODELS["mlp"], data), data, arms, (0, 3), how, engine)

    both = train(how, plain, replace(plain, name="slower", lr_scale=0.25))
    alone, slow = train(how, plain), train(quarter, plain)
    for seed in (0, 3):
        unscaled, mine = weights_of(alone, "ce", seed), weights_of(both, "slower", seed)
        assert same_bits(weights_of(both, "ce", seed), unscaled)
        assert largest_difference(mine, weights_of(slow, "ce", seed)) <= 1e-12
        assert largest_difference(mine, unscaled) > 1e-6


def test_folded_resnet18_drifts_by_rounding_only() -> None:
    """At most ten times as far as a change of one unit in the last place of every parameter."""
    data = toy_data((3, 8, 8), train=24, dtype=torch.float64)
    build = builder(resnet18, data)
    how = recipe(epochs=1, batch_size=8, make_optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9))
    module = trained(build, data, shipped("ce"), (0, 3), how, "fold")
    plain = trained_by_hand(build(3).double(), data, 3, how).state_dict()
    nudged = build(3).double()
    with torch.no_grad():  # every parameter by a unit in the last place
        for parameter in nudged.parameters():
            parameter.copy_(parameter.nextafter(torch.full_like(parameter, math.inf)))
    moved = trained_by_hand(nudged, data, 3, how).state_dict()
    drift = largest_difference(weights_of(module, "ce", 3), plain)
    assert drift <= 10 * largest_difference(moved, plain)


# --- precision


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("dtype", "inside"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.bfloat16)],
    ids=["float32", "float64", "bf16_mixed"],
)
def test_precision_of_weights_and_layers(dtype: torch.dtype, inside: torch.dtype, engine: str) -> None:
    seen: set[torch.dtype] = set()

    class Spy(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            seen.add(hidden.dtype)
            return hidden

    def make(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Spy(), nn.BatchNorm1d(8), nn.Linear(8, num_classes))

    data = toy_data(dtype=dtype)
    build = builder(make, data)
    seen.clear()
    module = trained(build, data, shipped("ce", "nll", "kl"), (0, 3), recipe(autocast=inside != dtype), engine)
    assert seen == {inside}
    assert {parameter.dtype for parameter in module.stack.parameters()} == {dtype}
    assert {t.dtype for t in weights_of(module, "ce", 0).values()} == {dtype, torch.int64}
    assert all(module.history(replica)["value"].notna().all() for replica in range(6))
    assert list(module.divergences()) == [None] * 6


# --- measurements


def small(*arms: str, how: Recipe | None = None) -> StackTrainingModule:
    data = toy_data()
    return trained(builder(MODELS["mlp"], data), data, shipped(*arms), (0, 3), how or recipe())


@pytest.fixture(scope="module", params=ENGINES)
def measured(request: pytest.FixtureRequest) -> StackTrainingModule:
    """Three epochs of four steps in float64."""
    data = toy_data(dtype=torch.float64)
    build = builder(MODELS["mlp with batch norm and dropout"], data)
    return trained(build, data, shipped("nll", "brier"), (0, 3), recipe(epochs=3), request.param)


def test_history_has_all_metrics_of_epochs_and_end(measured: StackTrainingModule) -> None:
    history, names = measured.history(1), ["nll", "accuracy", "brier", "ece"]
    assert history.groupby("metric")["step"].agg(list).to_dict() == {
        "train/objective": [4, 8, 12],
        **{f"val/{name}": [4, 8, 12] for name in names},
        **{f"{split}/{name}": [12] for split in ("train", "test") for name in names},
    }
    assert history.dtypes.astype(str).to_dict() == {"metric": "str", "step": "int64", "value": "float64"}


def test_metrics_are_those_of_the_replica_in_evaluation(measured: StackTrainingModule) -> None:
    data, last = measured.data, [measured.history(r).groupby("metric")["value"].last() for r in range(4)]
    plain = MODELS["mlp with batch norm and dropout"](data.input_shape, data.num_classes).double().eval()
    for replica, values in enumerate(last):
        plain.load_state_dict(measured.stack.weights(replica))
        for split in ("train", "val", "test"):
            inputs, labels = data.take(data.splits[split])
            logits = plain(inputs)
            assert values[f"{split}/nll"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-9)
            assert values[f"{split}/accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    nll = [values["val/nll"] for values in last]
    expected = {"nll": sum(nll[:2]) / 2, "brier": sum(nll[2:]) / 2}
    assert measured.latest("val/nll") == pytest.approx(expected, rel=1e-12)


def test_sketches_are_taken_at_1_3_10_and_the_end(measured: StackTrainingModule) -> None:
    assert measured.sketch_steps == [1, 3, 10, 12]
    assert len(measured.sketches) == 4
    last = torch.cat([t.flatten() for t in measured.stack.parameters_of(1).values()])
    assert torch.equal(measured.sketches[-1][1], last)


def test_captured_batches_do_not_hold_other_replicas(measured: StackTrainingModule) -> None:
    """torch saves the whole storage of a view: a cell would hold the logits of every replica."""
    tensors = [batch[name] for batch in measured.batches(1) for name in ("logits", "labels")]
    assert len(tensors) == 2 * 4
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_epoch_objective_is_a_mean_over_examples() -> None:
    """Batches of 16 and 4, and weights that do not move."""
    data = toy_data()
    build = builder(MODELS["mlp"], data)
    still = recipe(epochs=1, batch_size=16, make_optimizer=partial(torch.optim.SGD, lr=0.0))
    history = trained(build, data, shipped("ce"), (0,), still).history(0)
    inputs, labels = data.take(data.splits["train"])
    expected = F.cross_entropy(build(0)(inputs), labels).item()
    assert history.set_index("metric")["value"]["train/objective"] == pytest.approx(expected, rel=1e-6)


def test_training_that_ends_too_early_is_an_error() -> None:
    """Lightning treats every StopIteration as the end of the training."""

    class Stopping(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> None:
            self.calls += 1
            if self.calls == 7:
                raise StopIteration

    with pytest.raises(RuntimeError, match="training ended after 7 of 8 steps"):
        small("ce", how=recipe(make_optimizer=partial(Stopping, lr=0.1)))


# --- divergence


def test_loss_that_is_nan_diverges_at_its_first_step() -> None:
    first = Divergence(1, "the objective is not finite")
    assert list(small("ce", "kl_literal").divergences()) == [None, None, first, first]


def test_overflow_in_the_last_step_is_found() -> None:
    how = recipe(epochs=1, batch_size=20, make_optimizer=partial(torch.optim.SGD, lr=math.inf))
    assert list(small("ce", how=how).divergences()) == [Divergence(1, "the weights are not finite")] * 2


def test_later_divergence_has_its_step() -> None:
    how = recipe(epochs=1, batch_size=4, make_optimizer=partial(torch.optim.SGD, lr=1e30))
    found = list(small("ce", how=how).divergences())
    assert all(d is not None and 1 < d.step <= 5 and d.cause == "the objective is not finite" for d in found)


# --- layout of the data


def test_grey_pictures_are_repeated_for_a_colour_model() -> None:
    data = toy_data((1, 4, 4), dtype=torch.float64)

    def colour(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, num_classes))

    build = builder(colour, data)
    assert build.input_shape == (3, 4, 4)
    for engine in ENGINES:
        trained(build, data, shipped("ce"), (0, 3), recipe(), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_shared_batch_is_not_copied(engine: str) -> None:
    data = toy_data()
    stack = stack_of(builder(MODELS["mlp"], data), (0, 3, 5), engine)
    inputs, _ = data.take(data.splits["val"])
    shared = stack.shared(inputs)
    assert shared.data_ptr() == inputs.data_ptr()
    assert shared.shape[stack.replica_axis] == 3
    assert torch.equal(shared.select(stack.replica_axis, 2), inputs)


def test_channels_last_changes_a_cnn_by_rounding_only() -> None:
    how = recipe(epochs=5, batch_size=10)
    data = toy_data((2, 8, 8), dtype=torch.float64)
    build = builder(partial(cnn, channels=[4, 8], hidden=8), data)
    module = untrained(build, data, shipped("ce"), (3,), how, "loop")
    module.stack = build_stack("loop", [build(3).double()], [3], fast=True).train()
    assert next(module.stack.parameters()).is_contiguous(memory_format=torch.channels_last)
    fit(module, (), "cpu")
    plain = trained_by_hand(build(3).double(), data, 3, how).state_dict()
    assert largest_difference(module.stack.weights(0), plain) <= 1e-12


def interrupting(step: int, act: Callable[[], None]) -> Formulation:
    """Cross-entropy that calls `act` in its call number `step`."""
    calls = iter(range(1, 10**6))

    def fn(logits: Tensor, labels: Tensor) -> Tensor:
        if next(calls) == step:
            act()
        return F.cross_entropy(logits, labels)

    return Formulation("ce", ("logits", "labels"), lambda: fn)


def test_sigterm_is_an_interrupt_not_an_end() -> None:
    data = toy_data()
    ended = interrupting(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        trained(builder(softmax_regression, data), data, [ended], (0,), recipe(epochs=3))


def test_loss_that_exits_fails_alone() -> None:
    data = toy_data()
    module = trained(builder(softmax_regression, data), data, [interrupting(4, sys.exit)], (0,), recipe(epochs=3))
    (divergence,) = module.divergences()
    assert divergence is not None
    assert divergence.cause.startswith("the loss raised SystemExit")


def test_loss_that_overwrites_label_data_changes_no_other() -> None:
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
def test_evaluation_batches_have_no_single_example(count: int) -> None:
    batches = evaluation_batches(torch.arange(count))
    assert torch.equal(torch.cat(batches), torch.arange(count))
    assert count == 1 or min(map(len, batches)) > 1
    assert count % 500 == 1 or len(batches[0]) == min(count, 500)
