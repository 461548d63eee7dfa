"""A replica that fails says when and why, and the bits beside it do not know."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models import mlp
from pipeline.training.module import Divergence, StackTrainingModule
from pipeline.training.objectives import Formulation
from tests.laboratory import builder, recipe, same_bits, shipped, toy_data, trained, weights_of

FROM = 7  # of 12 steps, 4 an epoch


class FailingFrom(nn.Module):
    """Cross-entropy until a call, then what `fails` makes of it."""

    def __init__(self, fails: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fails, self.calls = fails, 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        objective = F.cross_entropy(logits, labels)
        return objective if self.calls < FROM else self.fails(objective)


def raising(objective: Tensor) -> Tensor:
    raise ArithmeticError("cannot")


def out_of_memory(objective: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda objective: objective * torch.nan, "the objective is not finite"),
    "Inf": (lambda objective: objective * torch.inf, "the objective is not finite"),
    "an exception": (raising, "the loss raised ArithmeticError: cannot"),
}


def beside(
    fails: Callable[[Tensor], Tensor] | None, engine: str, clip_norm: float | None = None
) -> StackTrainingModule:
    """Cross-entropy and Brier's score over two seeds, and between them, where given, a loss that fails."""
    data = toy_data()
    first, last = shipped("ce", "brier")
    failing = [Formulation("failing", ("logits", "labels"), lambda: FailingFrom(fails))] if fails else []
    how = recipe(epochs=3, clip_norm=clip_norm, make_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    return trained(builder(mlp, data), data, [first, *failing, last], (0, 3), how, engine)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("engine", ["fold", "loop"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_recorded_and_its_neighbours_keep_their_bits(
    fault: str, engine: str, clip_norm: float | None
) -> None:
    fails, cause = FAULTS[fault]
    stack, alone = beside(fails, engine, clip_norm), beside(None, engine, clip_norm)
    recorded = Divergence(FROM, cause)
    assert list(stack.divergences()) == [None, None, recorded, recorded, None, None]
    for neighbour in alone.replicas:
        assert same_bits(*(weights_of(module, neighbour.arm, neighbour.seed) for module in (stack, alone)))
        mine, other = (module.history(module.replicas.index(neighbour)) for module in (stack, alone))
        pd.testing.assert_frame_equal(mine, other, check_exact=True)
    metrics = stack.history(2).set_index(["metric", "step"])["value"]
    assert metrics[["val/nll"]].isna().tolist() == [False, True, True]
    assert metrics.loc[["test/nll", "train/nll"]].isna().all()


@pytest.mark.parametrize("engine", ["fold", "loop"])
def test_memory_that_runs_out_in_a_loss_is_the_trial_s_and_not_the_replica_s(engine: str) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        beside(out_of_memory, engine)
