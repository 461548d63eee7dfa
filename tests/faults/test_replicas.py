"""A replica that fails reports step and cause, and does not change the bits of the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import mlp
from pipeline.training.module import Divergence, StackTrainingModule
from pipeline.training.objectives import Formulation
from tests.laboratory import builder, recipe, same_bits, shipped, toy_data, trained, weights_of

FIRST_FAILURE = 7  # of 12 steps, 4 an epoch
Fault = Callable[[Tensor], Tensor]


class Failing(nn.Module):
    """Cross-entropy; from one call on, `fault` replaces its value."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        objective = F.cross_entropy(logits, labels)
        return objective if self.calls < FIRST_FAILURE else self.fault(objective)


def raising(objective: Tensor) -> Tensor:
    raise ArithmeticError("cannot")


def out_of_memory(objective: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


FAULTS: dict[str, tuple[Fault, str]] = {
    "NaN": (lambda objective: objective * torch.nan, "the objective is not finite"),
    "Inf": (lambda objective: objective * torch.inf, "the objective is not finite"),
    "an exception": (raising, "the loss raised ArithmeticError: cannot"),
}


@cache
def train(engine: str, clip_norm: float | None = None, fault: Fault | None = None) -> StackTrainingModule:
    """Train cross-entropy and Brier's score over two seeds, with a failing loss between them if one is given."""
    data = toy_data()
    first, last = shipped("ce", "brier")
    failing = [Formulation("failing", ("logits", "labels"), lambda: Failing(fault))] if fault else []
    how = recipe(epochs=3, clip_norm=clip_norm, make_optimizer=partial(torch.optim.Adam, lr=0.01))
    return trained(builder(mlp, data), data, [first, *failing, last], (0, 3), how, engine)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_recorded_and_neighbours_keep_bits(fault: str, engine: str, clip_norm: float | None) -> None:
    function, cause = FAULTS[fault]
    stack, alone = train(engine, clip_norm, function), train(engine, clip_norm)
    failure = Divergence(FIRST_FAILURE, cause)
    assert list(stack.divergences()) == [None, None, failure, failure, None, None]
    for neighbour in alone.replicas:
        assert same_bits(*(weights_of(module, neighbour.arm, neighbour.seed) for module in (stack, alone)))
        mine, other = (module.history(module.replicas.index(neighbour)) for module in (stack, alone))
        pd.testing.assert_frame_equal(mine, other, check_exact=True)
    metrics = stack.history(2).set_index(["metric", "step"])["value"]
    assert metrics[["val/nll"]].isna().tolist() == [False, True, True]
    assert metrics.loc[["test/nll", "train/nll"]].isna().all()


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_out_of_memory_in_a_loss_ends_the_trial(engine: str) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        train(engine, fault=out_of_memory)
