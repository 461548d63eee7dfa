from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from sklearn.metrics import log_loss
from torch import Tensor

from likelihood_lab.categorical.inputs import derive
from likelihood_lab.categorical.losses import (
    brier_score,
    literal_kl_divergence,
    log_likelihood,
    negative_log_likelihood,
    negative_log_of_product,
    reverse_kl_divergence,
)
from tests.laboratory import CPU, shipped

# These are one function of the logits, up to rounding and a factor of the batch size.
SAME = ("ce", "ce_one_hot", "ce_soft", "ce_soft_logsumexp", "kl", "nll", "nll_logsumexp", "nll_softmax")
SUMS = ("likelihood_product", "log_likelihood")
CONTROLS = ("brier", "double_softmax", "kl_mean", "label_smoothing", "nll_on_probs", "reverse_kl")

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # kl_mean's very point


def batch(count: int = 6, num_classes: int = 4, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(count, num_classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(num_classes, (count,), generator=generator)


def soft_targets(count: int = 6, num_classes: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, num_classes, generator=generator, dtype=torch.float64).softmax(1)


def value(name: str, logits: Tensor, labels: Tensor, target_probs: Tensor | None = None) -> Tensor:
    """A shipped formulation on one batch."""
    (formulation,) = shipped(name)
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    inputs = derive(formulation.args, logits)
    inputs |= {"labels": labels, "target_probs": one_hot if target_probs is None else target_probs}
    fn = formulation.instance(CPU, logits.dtype)
    return formulation.objective(fn, [inputs[arg] for arg in formulation.args])


def value_and_gradient(name: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    objective = value(name, leaf, labels)
    return objective.detach(), torch.autograd.grad(objective, leaf)[0]


def nll_by_hand(logits: Tensor, labels: Tensor) -> float:
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in rows) / len(labels)


def test_every_shipped_loss_is_tested_here() -> None:
    assert {f.name for f in shipped()} == {*SAME, *SUMS, *CONTROLS, "kl_literal"}


@pytest.mark.parametrize("name", SAME)
def test_equal_losses_have_the_textbook_value_and_gradient(name: str) -> None:
    logits, labels = batch()
    objective, gradient = value_and_gradient(name, logits, labels)
    assert objective.item() == pytest.approx(nll_by_hand(logits, labels), rel=1e-14)
    assert objective.item() == pytest.approx(log_loss(labels, logits.softmax(1), labels=range(4)), rel=1e-12)
    expected = (logits.softmax(1) - F.one_hot(labels, 4)) / len(labels)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_the_batch_size_times_the_mean(name: str) -> None:
    logits, labels = batch()
    objective, gradient = value_and_gradient(name, logits, labels)
    assert objective.item() == pytest.approx(6 * nll_by_hand(logits, labels), rel=1e-14)
    torch.testing.assert_close(gradient, logits.softmax(1) - F.one_hot(labels, 4), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_have_another_gradient(name: str) -> None:
    logits, labels = batch()
    gradient, reference = (value_and_gradient(loss, logits, labels)[1] for loss in (name, "ce"))
    assert (gradient - reference).abs().max() > 0.05 * reference.abs().max()


def test_losses_of_a_uniform_model_have_closed_forms() -> None:
    logits, labels = torch.zeros(8, 10, dtype=torch.float64), torch.arange(8)
    uniform = math.log(10)
    expected = dict.fromkeys([*SAME, "double_softmax", "label_smoothing"], uniform) | dict.fromkeys(SUMS, 8 * uniform)
    expected |= {"kl_mean": uniform / 10, "brier": 0.9, "nll_on_probs": -0.1}
    expected["reverse_kl"] = -uniform - 0.9 * math.log(1e-6)
    assert {name: value(name, logits, labels).item() for name in expected} == pytest.approx(expected, rel=1e-14)


def test_log_likelihood_grows_with_better_predictions() -> None:
    logits, labels = batch()
    log_probs = logits.log_softmax(1)
    assert log_likelihood(log_probs, labels).item() < 0
    assert negative_log_likelihood(log_probs, labels) == -log_likelihood(log_probs, labels)
    better = (logits + 10 * F.one_hot(labels, 4)).log_softmax(1)
    assert log_likelihood(better, labels) > log_likelihood(log_probs, labels)


# --- the divergence


def test_divergence_from_itself_is_zero() -> None:
    targets = soft_targets()
    labels = targets.argmax(1)
    for name in ("kl", "kl_mean", "kl_literal", "reverse_kl"):
        assert value(name, targets.log(), labels, targets).item() == pytest.approx(0, abs=1e-15), name


def test_divergences_match_scipys_entropy() -> None:
    logits, labels = batch()
    targets = soft_targets()
    p, q = targets.numpy(), logits.softmax(1).numpy()
    for name, expected in (("kl", (p, q)), ("kl_literal", (p, q)), ("reverse_kl", (q, p))):
        divergence = entropy(*expected, axis=1).mean()
        assert value(name, logits, labels, targets).item() == pytest.approx(divergence, rel=1e-12), name


def test_reverse_divergence_is_finite_by_its_floor() -> None:
    one_hot = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    log_probs = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    expected = 0.25 * math.log(0.25) + 0.75 * (math.log(0.75) - math.log(1e-3))
    assert reverse_kl_divergence(log_probs, one_hot, floor=1e-3).item() == pytest.approx(expected, rel=1e-14)
    assert math.isinf(reverse_kl_divergence(log_probs, one_hot, floor=0.0).item())


def test_literal_divergence_is_nan_for_one_hot_labels() -> None:
    logits, labels = batch()
    objective, gradient = value_and_gradient("kl_literal", logits, labels)
    assert objective.isnan()
    assert gradient.isnan().any(1).all()
    assert literal_kl_divergence(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).isnan()


def test_kl_mean_divides_by_the_classes_too() -> None:
    logits, labels = batch()
    (mean, mean_gradient), (right, gradient) = (value_and_gradient(name, logits, labels) for name in ("kl_mean", "kl"))
    torch.testing.assert_close(mean, right / 4, rtol=1e-14, atol=0)
    torch.testing.assert_close(mean_gradient, gradient / 4, rtol=1e-13, atol=0)


# --- where the spellings break


def test_product_of_64_guesses_underflows_in_float32_only() -> None:
    labels = torch.arange(64) % 10
    for dtype, expected in ((torch.float32, math.inf), (torch.float64, 64 * math.log(10))):
        probs = torch.full((64, 10), 0.1, dtype=dtype)
        assert negative_log_of_product(probs, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("gap", "finite"), [(80.0, True), (103.0, True), (105.0, False)])
def test_log_of_softmax_is_infinite_beyond_a_gap_of_103(gap: float, finite: bool) -> None:
    logits, labels = torch.tensor([[gap, 0.0]]), torch.tensor([1])
    assert value("nll_softmax", logits, labels).isfinite().item() is finite
    for name in ("nll", "ce", "nll_logsumexp"):
        assert value(name, logits, labels).item() == gap


@pytest.mark.parametrize("num_classes", [3, 10])
def test_double_softmax_has_a_positive_minimum(num_classes: int) -> None:
    labels = torch.arange(num_classes)
    perfect = 1e4 * torch.eye(num_classes, dtype=torch.float64)
    floor = math.log(1 + (num_classes - 1) / math.e)
    assert value("double_softmax", perfect, labels).item() == pytest.approx(floor, rel=1e-14)
    assert value("ce", perfect, labels).item() == 0


# --- the Brier score


def test_brier_score_matches_its_definition_and_scikit_learn() -> None:
    """The score of two classes is twice scikit-learn's; the range is 0 to 2."""
    from sklearn.metrics import brier_score_loss

    probs, targets = batch()[0].softmax(1), soft_targets()
    expected = np.mean(np.sum((probs.numpy() - targets.numpy()) ** 2, 1))
    assert brier_score(probs, targets).item() == pytest.approx(expected, rel=1e-14)
    logits, labels = batch(num_classes=2)
    expected = 2 * brier_score_loss(labels, logits.softmax(1)[:, 1], labels=[0, 1])
    assert value("brier", logits, labels).item() == pytest.approx(expected, rel=1e-14)
    sure = torch.eye(2)
    assert (brier_score(sure, sure).item(), brier_score(sure, sure.flip(0)).item()) == (0, 2)


# --- gradients


@pytest.mark.parametrize("name", [*SAME, *SUMS, *CONTROLS])
def test_gradients_match_finite_differences(name: str) -> None:
    logits, labels = batch(scale=1.0)
    assert torch.autograd.gradcheck(lambda z: value(name, z, labels), logits.requires_grad_())
