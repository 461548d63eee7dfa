from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab.audit.api import check
from likelihood_lab.audit.context import audit_of
from likelihood_lab.audit.evaluate import Loss
from likelihood_lab.audit.rounding import CONSTANT
from likelihood_lab.categorical.oracle import Exact, cross_entropy

ON_TARGETS = ("logits", "target_probs")


def oracle(logits: Tensor, targets: Tensor) -> Exact:
    return cross_entropy(logits.tolist(), targets.tolist())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_cross_entropy_of_equal_logits_is_log_of_classes(classes: int) -> None:
    logits = torch.full((2, classes), 7.25, dtype=torch.float64)
    targets = F.one_hot(torch.tensor([0, classes - 1]), classes).double()
    found = oracle(logits, targets)
    assert found.value == pytest.approx(math.log(classes), rel=1e-15)
    torch.testing.assert_close(found.gradient, (1 / classes - targets) / 2, rtol=1e-15, atol=0)


@pytest.mark.parametrize("gap", [0.5, 40.0, 79.0])
def test_cross_entropy_of_two_classes_is_the_logistic_loss(gap: float) -> None:
    """l = log(1 + e^g) at the wrong class and log(1 + e^-g) at the right one: no digit of a tiny gradient is lost."""
    tail = math.exp(-gap) / (1 + math.exp(-gap))
    wrong, right = (oracle(torch.tensor([[gap, 0.0]]), torch.tensor([y])) for y in ([0.0, 1.0], [1.0, 0.0]))
    assert wrong.value == pytest.approx(gap + math.log1p(math.exp(-gap)), rel=1e-15)
    assert right.value == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-15)
    torch.testing.assert_close(wrong.gradient, torch.tensor([[1 - tail, tail - 1]], dtype=torch.float64))
    torch.testing.assert_close(right.gradient, torch.tensor([[-tail, tail]], dtype=torch.float64), rtol=1e-14, atol=0)


def test_cross_entropy_of_targets_of_another_mass() -> None:
    logits = normal(1, 4)
    targets = torch.tensor([[0.5, 0.5, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(oracle(logits, targets).gradient, 2 * logits.softmax(1) - targets)


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_matches_torch_in_float64(soft: bool) -> None:
    logits = 5 * normal(6, 7)
    targets = normal(6, 7, seed=1).softmax(1) if soft else F.one_hot(torch.arange(6), 7).double()
    leaf = logits.clone().requires_grad_()
    value = F.cross_entropy(leaf, targets)
    (gradient,) = torch.autograd.grad(value, leaf)
    found = oracle(logits, targets)
    assert found.value == pytest.approx(value.item(), rel=1e-14)
    torch.testing.assert_close(gradient, found.gradient, rtol=1e-13, atol=1e-16)


def test_cross_entropy_ignores_the_precision_of_mpmath() -> None:
    import mpmath

    logits, targets = torch.tensor([[40.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    with mpmath.workdps(3):
        assert torch.equal(oracle(logits, targets).gradient, oracle(logits, targets).gradient)
        assert oracle(logits, targets).gradient[0, 1].item() == pytest.approx(math.exp(-40), rel=1e-14)
        assert mpmath.mp.dps == 3


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("soft_targets", [False, True])
def test_reference_is_within_rounding_of_the_oracle(tokens: bool, soft_targets: bool) -> None:
    reference = Loss(F.cross_entropy, ON_TARGETS) if soft_targets else Loss(F.cross_entropy, ("logits", "labels"))
    audit = audit_of(reference, reference.args, soft_targets=soft_targets, tokens=tokens, num_classes=(2, 10))
    assert audit.oracle_units is not None
    assert 0 < audit.oracle_units < CONSTANT / 2


def test_reference_off_by_a_millionth_is_far_from_the_oracle() -> None:
    smoothed = Loss(lambda z, y: F.cross_entropy(z, y, label_smoothing=1e-6), ("logits", "labels"))
    units = audit_of(smoothed, smoothed.args, num_classes=(2, 10)).oracle_units
    assert units is not None
    assert units > 1e6


def test_finding_has_the_oracle_units_of_the_reference() -> None:
    units = check(F.cross_entropy, num_classes=(2, 10)).evidence["oracle_units"]
    assert 0 < units < CONSTANT
