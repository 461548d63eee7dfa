from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor

from pipeline.yardsticks import NUM_BINS, Yardsticks

NAMES = ["nll", "accuracy", "brier", "ece"]


def examples(count: int = 200, num_classes: int = 5, replicas: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(replicas, count, num_classes, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return logits, labels, F.one_hot(labels, num_classes).float()


def measured(logits: Tensor, labels: Tensor, target_probs: Tensor, sizes: list[int] | None = None) -> dict[str, Tensor]:
    yardsticks = Yardsticks(len(logits), torch.device("cpu"))
    split = sizes or [len(labels)]
    batches = zip(logits.split(split, 1), labels.split(split), target_probs.split(split), strict=True)
    for batch in batches:
        yardsticks.update(*batch)
    return yardsticks.result()


def ece_by_hand(probs: Tensor, labels: Tensor) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    confidence, top = (array.numpy() for array in probs.max(1))
    error = 0.0
    for low in range(NUM_BINS):
        inside = (confidence >= low / NUM_BINS) & (confidence < (low + 1) / NUM_BINS)
        if inside.any():
            accuracy = np.mean(top[inside] == labels.numpy()[inside])
            error += inside.mean() * abs(accuracy - confidence[inside].mean())
    return error


def test_the_yardsticks_are_those_of_scikit_learn_and_of_the_definitions() -> None:
    logits, labels, one_hot = examples()
    found = measured(logits, labels, one_hot)
    assert list(found) == NAMES
    for replica, probs in enumerate(logits.double().softmax(-1)):
        expected = {
            "nll": log_loss(labels, probs, labels=range(5)),
            "accuracy": accuracy_score(labels, probs.argmax(1)),
            "brier": np.mean(np.sum((probs.numpy() - one_hot.numpy()) ** 2, 1)),
            "ece": ece_by_hand(probs, labels),
        }
        assert {name: found[name][replica].item() for name in NAMES} == pytest.approx(expected, rel=1e-12)


def test_the_brier_score_of_two_classes_is_twice_scikit_learns() -> None:
    from sklearn.metrics import brier_score_loss

    logits, labels, one_hot = examples(num_classes=2, replicas=1)
    expected = 2 * brier_score_loss(labels, logits[0].double().softmax(1)[:, 1])
    assert measured(logits, labels, one_hot)["brier"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 200, [199, 1], [64, 64, 64, 8]])
def test_how_the_examples_are_batched_does_not_matter(sizes: list[int]) -> None:
    whole, batched = measured(*examples()), measured(*examples(), sizes=sizes)
    for name in NAMES:
        torch.testing.assert_close(batched[name], whole[name], rtol=1e-12, atol=0)


def test_the_definitions_hold_on_an_example_worked_by_hand() -> None:
    """Probabilities (3/4, 1/4) and (1/2, 1/2), labels 0 and 1; a tie goes to the first class."""
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]], dtype=torch.float64)
    found = measured(logits, torch.tensor([0, 1]), torch.eye(2))
    assert found["nll"].item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-15)
    assert found["accuracy"].item() == 0.5
    assert found["brier"].item() == pytest.approx((2 / 16 + 2 / 4) / 2, rel=1e-15)
    assert found["ece"].item() == pytest.approx((1 / 4 + 1 / 2) / 2, rel=1e-15)


def test_a_sure_and_right_model_has_no_loss_and_a_sure_and_wrong_one_a_finite_loss() -> None:
    logits = torch.tensor([[[1e4, 0.0]], [[-1e4, 0.0]]])
    found = measured(logits, torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    assert found["nll"].tolist() == [0.0, 1e4]
    assert found["accuracy"].tolist() == [1.0, 0.0]
    assert found["brier"].tolist() == [0.0, 2.0]
    assert found["ece"].tolist() == [0.0, 1.0]


def test_the_most_probable_class_has_the_largest_logit_even_where_probabilities_round_to_a_tie() -> None:
    logits = torch.tensor([[[0.0, 1e-20]]])
    assert measured(logits, torch.tensor([1]), torch.tensor([[0.0, 1.0]]))["accuracy"].item() == 1.0


def test_soft_targets_give_the_cross_entropy_and_the_distance_to_them() -> None:
    logits, labels, _ = examples()
    targets = torch.rand(200, 5, generator=torch.Generator().manual_seed(1)).softmax(1).double()
    found = measured(logits, labels, targets)
    for replica, z in enumerate(logits.double()):
        assert found["nll"][replica].item() == pytest.approx(F.cross_entropy(z, targets).item(), rel=1e-12)
        brier = (z.softmax(1) - targets).square().sum(1).mean().item()
        assert found["brier"][replica].item() == pytest.approx(brier, rel=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_replica_with_a_logit_that_is_not_finite_is_nan_and_the_others_keep_their_bits(
    poison: float,
) -> None:
    logits, labels, one_hot = examples()
    healthy = measured(logits, labels, one_hot, [150, 50])
    logits[1, 3, 2] = poison
    sick = measured(logits, labels, one_hot, [150, 50])
    for name in NAMES:
        assert sick[name][1].isnan()
        assert torch.equal(sick[name][[0, 2]], healthy[name][[0, 2]])


def test_logits_of_low_precision_are_measured_in_float64() -> None:
    logits, labels, one_hot = examples()
    low = logits.bfloat16()
    found, exact = measured(low, labels, one_hot), measured(low.double(), labels, one_hot)
    assert all(found[name].dtype == torch.float64 and torch.equal(found[name], exact[name]) for name in NAMES)
