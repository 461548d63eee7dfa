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


# --- KL to the truth


def to_the_truth(logits: Tensor, truth: Tensor, sizes: list[int] | None = None) -> Tensor:
    """kl_truth of each replica; targets are of no account."""
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


def test_the_divergence_from_the_truth_is_scipys() -> None:
    from scipy.stats import entropy

    logits, truth = examples()[0], truths()
    for found, probs in zip(to_the_truth(logits, truth), logits.double().softmax(-1), strict=True):
        assert found.item() == pytest.approx(entropy(truth.numpy(), probs.numpy(), axis=1).mean(), rel=1e-13)


def test_the_divergence_from_the_truth_holds_in_fifty_digits_where_it_is_tiny_and_where_it_is_large() -> None:
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


def test_the_truth_itself_is_at_no_distance_and_nothing_is_nearer() -> None:
    truth = truths()
    assert to_the_truth(truth.clamp_min(1e-300).log()[None], truth).item() == pytest.approx(0, abs=1e-15)
    assert (to_the_truth(examples()[0], truth) > 0).all()


def test_the_truth_is_weighted_by_counts_and_leaves_the_other_yardsticks_their_bits() -> None:
    logits, labels, one_hot = examples()
    torch.testing.assert_close(
        to_the_truth(logits, truths(), [199, 1]), to_the_truth(logits, truths()), rtol=1e-12, atol=0
    )
    metrics = MetricSums(3, torch.device("cpu"))
    metrics.update(logits, labels, one_hot, truths())
    found, without = metrics.result(), measured(logits, labels, one_hot)
    assert list(found) == [*NAMES, "kl_truth"]
    assert all(torch.equal(found[name], without[name]) for name in NAMES)


def test_a_replica_that_is_not_finite_has_no_distance_to_the_truth() -> None:
    logits = examples()[0]
    logits[1, 3, 2] = math.inf
    assert to_the_truth(logits, truths()).isnan().tolist() == [False, True, False]
