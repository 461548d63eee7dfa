from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor

from likelihood_lab.categorical.metrics import NUM_BINS, MetricSums

NAMES = ["nll", "accuracy", "brier", "ece"]


def examples(count: int = 200, num_classes: int = 5, replicas: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(replicas, count, num_classes, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return logits, labels, F.one_hot(labels, num_classes).float()


def measured(logits: Tensor, labels: Tensor, target_probs: Tensor, sizes: list[int] | None = None) -> dict[str, Tensor]:
    metrics = MetricSums(len(logits), torch.device("cpu"))
    split = sizes or [len(labels)]
    batches = zip(logits.split(split, 1), labels.split(split), target_probs.split(split), strict=True)
    for batch in batches:
        metrics.update(*batch)
    return metrics.result()


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


def test_metrics_match_scikit_learn_and_the_definitions() -> None:
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


@pytest.mark.parametrize("sizes", [[1] * 200, [199, 1], [64, 64, 64, 8]])
def test_metrics_do_not_depend_on_the_batching(sizes: list[int]) -> None:
    whole, batched = measured(*examples()), measured(*examples(), sizes=sizes)
    for name in NAMES:
        torch.testing.assert_close(batched[name], whole[name], rtol=1e-12, atol=0)


def test_metrics_of_a_hand_worked_example() -> None:
    """Probabilities (3/4, 1/4) and (1/2, 1/2), labels 0 and 1; a tie goes to the first class."""
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]], dtype=torch.float64)
    found = measured(logits, torch.tensor([0, 1]), torch.eye(2))
    assert found["nll"].item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-15)
    assert found["accuracy"].item() == 0.5
    assert found["brier"].item() == pytest.approx((2 / 16 + 2 / 4) / 2, rel=1e-15)
    assert found["ece"].item() == pytest.approx((1 / 4 + 1 / 2) / 2, rel=1e-15)


def test_metrics_of_sure_models_are_finite() -> None:
    logits = torch.tensor([[[1e4, 0.0]], [[-1e4, 0.0]]])
    found = measured(logits, torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    assert found["nll"].tolist() == [0.0, 1e4]
    assert found["accuracy"].tolist() == [1.0, 0.0]
    assert found["brier"].tolist() == [0.0, 2.0]
    assert found["ece"].tolist() == [0.0, 1.0]


def test_accuracy_uses_logits_if_probabilities_tie() -> None:
    logits = torch.tensor([[[0.0, 1e-20]]])
    assert measured(logits, torch.tensor([1]), torch.tensor([[0.0, 1.0]]))["accuracy"].item() == 1.0


def test_metrics_of_soft_targets() -> None:
    logits, labels, _ = examples()
    targets = torch.rand(200, 5, generator=torch.Generator().manual_seed(1)).softmax(1).double()
    found = measured(logits, labels, targets)
    for replica, z in enumerate(logits.double()):
        assert found["nll"][replica].item() == pytest.approx(F.cross_entropy(z, targets).item(), rel=1e-12)
        brier = (z.softmax(1) - targets).square().sum(1).mean().item()
        assert found["brier"][replica].item() == pytest.approx(brier, rel=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_replica_is_nan_and_leaves_the_others(
    poison: float,
) -> None:
    logits, labels, one_hot = examples()
    healthy = measured(logits, labels, one_hot, [150, 50])
    logits[1, 3, 2] = poison
    sick = measured(logits, labels, one_hot, [150, 50])
    for name in NAMES:
        assert sick[name][1].isnan()
        assert torch.equal(sick[name][[0, 2]], healthy[name][[0, 2]])


def test_metrics_of_low_precision_are_float64() -> None:
    logits, labels, one_hot = examples()
    low = logits.bfloat16()
    found, exact = measured(low, labels, one_hot), measured(low.double(), labels, one_hot)
    assert all(found[name].dtype == torch.float64 and torch.equal(found[name], exact[name]) for name in NAMES)


# --- KL to the truth


def to_the_truth(logits: Tensor, truth: Tensor, sizes: list[int] | None = None) -> Tensor:
    """kl_truth of each replica; targets do not matter."""
    labels, targets = truth.argmax(1), torch.full_like(truth, 1 / truth.shape[1])
    metrics = MetricSums(len(logits), torch.device("cpu"))
    for rows in torch.arange(len(truth)).split(sizes or [len(truth)]):
        metrics.update(logits[:, rows], labels[rows], targets[rows], truth[rows])
    return metrics.result()["kl_truth"]


def truths(count: int = 200, num_classes: int = 5) -> Tensor:
    """Distributions, one in ten of them with all mass on one class and one in ten with none on some."""
    truth = (2 * torch.randn(count, num_classes, generator=torch.Generator().manual_seed(2)).double()).softmax(1)
    truth[::10] = torch.eye(num_classes, dtype=torch.float64)[0]
    truth[5::10] = torch.tensor([0.25, 0.75, *[0.0] * (num_classes - 2)], dtype=torch.float64)
    return truth


def test_kl_truth_matches_scipy() -> None:
    from scipy.stats import entropy

    logits, truth = examples()[0], truths()
    for found, probs in zip(to_the_truth(logits, truth), logits.double().softmax(-1), strict=True):
        assert found.item() == pytest.approx(entropy(truth.numpy(), probs.numpy(), axis=1).mean(), rel=1e-13)


def test_kl_truth_matches_mpmath_for_extreme_values() -> None:
    import mpmath

    truth = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    logits = torch.tensor([[[0.0, math.log(4) + 1e-3], [700.0, -50.0], [30.0, 0.0]]], dtype=torch.float64)
    exact = mpmath.mpf(0)
    with mpmath.workdps(50):
        for p, z in zip(truth.tolist(), logits[0].tolist(), strict=True):
            log_sum = mpmath.log(sum(mpmath.exp(mpmath.mpf(value)) for value in z))
            exact += sum(a * (mpmath.log(a) - b + log_sum) for a, b in zip(p, z, strict=True) if a > 0)
        expected = float(exact / 3)
    assert to_the_truth(logits, truth).item() == pytest.approx(expected, rel=1e-14)
    assert to_the_truth(logits[:, :1], truth[:1]).item() == pytest.approx(0.2 * 0.8 * 1e-6 / 2, rel=1e-3)


def test_kl_truth_is_zero_for_the_truth_only() -> None:
    truth = truths()
    assert to_the_truth(truth.clamp_min(1e-300).log()[None], truth).item() == pytest.approx(0, abs=1e-15)
    logits = examples()[0]
    assert (to_the_truth(logits, truth) > 0).all()
    logits[1, 3, 2] = math.inf
    assert to_the_truth(logits, truth).isnan().tolist() == [False, True, False]


def test_kl_truth_is_weighted_and_leaves_other_metrics() -> None:
    logits, labels, one_hot = examples()
    torch.testing.assert_close(
        to_the_truth(logits, truths(), [199, 1]), to_the_truth(logits, truths()), rtol=1e-12, atol=0
    )
    metrics = MetricSums(3, torch.device("cpu"))
    metrics.update(logits, labels, one_hot, truths())
    found, without = metrics.result(), measured(logits, labels, one_hot)
    assert list(found) == [*NAMES, "kl_truth"]
    assert all(torch.equal(found[name], without[name]) for name in NAMES)
