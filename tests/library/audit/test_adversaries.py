"""Losses that are built to pass the audit: each is another function somewhere, and none is called the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab import assert_same_loss, check
from likelihood_lab.categorical.inputs import LossFn
from likelihood_lab.errors import UsageError
from tests.library.audit.shared import FUSED, NARROW, ON_TARGETS, logit_gradient, quick, smoothed_where


def clamped_above(logits: Tensor, labels: Tensor) -> Tensor:
    """No gradient where p_y is within a millionth of 1."""
    log_probs = logits.log_softmax(1)
    return F.nll_loss(log_probs.where(log_probs.exp() < 1 - 1e-6, log_probs.detach()), labels)


def soft_plus(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 + sum exp) by softplus, which is linear from 20 on."""
    gaps = (logits - logits.gather(1, labels[:, None])).scatter(1, labels[:, None], -torch.inf)
    return F.softplus(gaps.logsumexp(1)).mean()


WRONG_IN_FLOAT64 = {
    "for many classes": smoothed_where(lambda z, y: z.shape[-1] >= 1000, 1e-5),
    "for the most classes alone": smoothed_where(lambda z, y: z.shape[-1] >= 50_000, 1e-4),
    "for many rows": smoothed_where(lambda z, y: len(z) > 64, 1e-6),
    "near certainty": clamped_above,
    "beyond a gap of 20": soft_plus,
}


@pytest.mark.parametrize("fn", WRONG_IN_FLOAT64.values(), ids=WRONG_IN_FLOAT64)
def test_fault_in_float64_is_not_excused_by_float32(fn: LossFn) -> None:
    found = check(fn)
    assert not found.same, found.sentence


class SharedState(torch.autograd.Function):
    """Saves for backward in the class, so that the next call overwrites it."""

    saved: ClassVar[list[Any]] = []

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        SharedState.saved[:] = [logits, labels]
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return logit_gradient(*SharedState.saved) * upstream[0], None


def test_loss_with_shared_state_is_different() -> None:
    found = quick(SharedState.apply)
    text = "a second forward before the first backward changes the first gradient (breaks gradient accumulation)"
    assert (found.objective, found.sentence) == ("different", text)
    assert f"keeps state: {text}" in found.side_effects


@pytest.mark.parametrize(
    ("fn", "reference"),
    [
        (lambda z, y: z.square().mean(), lambda z, y: (z.softmax(-1) * 0 / 0).sum() + F.cross_entropy(z, y)),
        (lambda z, y: (z * 0 + 3).mean(), lambda z, y: (z * 0 + 3).mean()),
    ],
    ids=["NaN", "0"],
)
def test_reference_without_a_gradient_is_refused(fn: LossFn, reference: LossFn) -> None:
    with pytest.raises(UsageError, match="the reference"):
        check(fn, reference)


@pytest.mark.parametrize("off", [lambda value: value + float("nan"), lambda value: value - value.detach()])
def test_grossly_wrong_value_fails_the_assertion(off: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError, match="value"):
        assert_same_loss(lambda z, y: off(F.cross_entropy(z, y)), num_classes=NARROW)


@pytest.mark.parametrize("index", [0, 1])
def test_ignore_index_may_be_a_class(index: int) -> None:
    def correct(logits: Tensor, target_probs: Tensor) -> Tensor:
        return -(target_probs * logits.log_softmax(-1)).sum() / target_probs.sum()

    assert check(lambda z, y: F.cross_entropy(z, y, ignore_index=index), ignore_index=index).objective == "identical"
    assert quick(correct, args=ON_TARGETS, ignore_index=index).same


def test_reference_has_to_ignore_the_ignored_targets() -> None:
    with pytest.raises(UsageError, match="let it ignore them too"):
        quick(F.cross_entropy, lambda z, y: F.cross_entropy(z, y), ignore_index=-1)
    assert quick(lambda z, y: F.cross_entropy(z, y, ignore_index=-1), torch.nn.CrossEntropyLoss(), ignore_index=-1).same


def test_reference_that_changes_is_evaluated_again() -> None:
    reference = torch.nn.CrossEntropyLoss()
    assert quick(F.cross_entropy, reference).objective == "identical"
    reference.label_smoothing = 0.1
    assert quick(F.cross_entropy, reference).objective == "different"


def test_fused_loss_may_subtract_the_maximum_undetached() -> None:
    def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden @ weight.T
        shifted = logits - logits.max(1, keepdim=True).values
        return (shifted.exp().sum(1).log() - shifted.gather(1, labels[:, None])[:, 0]).mean()

    assert check(fused, args=FUSED).same
