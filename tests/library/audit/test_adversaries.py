"""Losses made to pass: each is another function somewhere, and none is called the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab.audit.api import assert_same_loss, check
from likelihood_lab.errors import UsageError

Loss = Callable[..., Tensor]


def smoothed(amount: float, where: Callable[[Tensor], bool]) -> Loss:
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=amount if where(logits) else 0.0)


def clamped_above(logits: Tensor, labels: Tensor) -> Tensor:
    """No gradient where p_y is within a millionth of 1."""
    log_probs = logits.log_softmax(1)
    return F.nll_loss(log_probs.where(log_probs.exp() < 1 - 1e-6, log_probs.detach()), labels)


def soft_plus(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 + sum exp) by softplus, which is linear from 20 on."""
    gaps = (logits - logits.gather(1, labels[:, None])).scatter(1, labels[:, None], -torch.inf)
    return F.softplus(gaps.logsumexp(1)).mean()


WRONG_IN_FLOAT64 = {
    "for many classes": smoothed(1e-5, lambda logits: logits.shape[-1] >= 1000),
    "for the most classes alone": smoothed(1e-4, lambda logits: logits.shape[-1] >= 50_000),
    "for many rows": smoothed(1e-6, lambda logits: len(logits) > 64),
    "near certainty": clamped_above,
    "beyond a gap of 20": soft_plus,
}


@pytest.mark.parametrize("name", WRONG_IN_FLOAT64)
def test_float32_is_no_excuse_for_what_never_leaves_float64(name: str) -> None:
    found = check(WRONG_IN_FLOAT64[name])
    assert not found.same, found.sentence


class _Forgetful(torch.autograd.Function):
    """Keeps what it needs in the class, so that the next call overwrites it."""

    kept: ClassVar[list[Any]] = []

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        _Forgetful.kept[:] = [logits.softmax(1), labels]
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        probs, labels = _Forgetful.kept
        return (probs - F.one_hot(labels, probs.shape[1])) / len(labels) * upstream[0], None


def test_a_loss_that_forgets_an_earlier_call_is_not_the_same() -> None:
    found = check(_Forgetful.apply, num_classes=(2, 10))
    assert found.objective == "different"
    assert any(effect.startswith("keeps state: a second forward") for effect in found.side_effects)


def test_a_reference_without_a_gradient_judges_nothing() -> None:
    def dead(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.softmax(-1) * 0 / 0).sum() + F.cross_entropy(logits, labels)

    with pytest.raises(UsageError, match="the reference"):
        check(lambda logits, labels: logits.square().mean(), dead)
    with pytest.raises(UsageError, match="the reference"):
        check(lambda logits, labels: (logits * 0 + 3).mean(), lambda logits, labels: (logits * 0 + 3).mean())


@pytest.mark.parametrize("off", [lambda value: value + float("nan"), lambda value: value - value.detach()])
def test_a_value_that_is_grossly_wrong_fails_the_assertion_and_is_named(off: Callable[[Tensor], Tensor]) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return off(F.cross_entropy(logits, labels))

    with pytest.raises(AssertionError, match="value"):
        assert_same_loss(loss, num_classes=(2, 10))


@pytest.mark.parametrize("index", [0, 1])
def test_an_index_to_ignore_that_is_a_class_is_no_reason_to_accuse(index: int) -> None:
    def honest(logits: Tensor, target_probs: Tensor) -> Tensor:
        return -(target_probs * logits.log_softmax(-1)).sum() / target_probs.sum()

    assert check(lambda z, y: F.cross_entropy(z, y, ignore_index=index), ignore_index=index).objective == "identical"
    assert check(honest, args=("logits", "target_probs"), ignore_index=index, num_classes=(2, 10)).same


def test_a_reference_that_does_not_ignore_cannot_cover_ignored_targets() -> None:
    with pytest.raises(UsageError, match="let it ignore them too"):
        check(F.cross_entropy, lambda z, y: F.cross_entropy(z, y), ignore_index=-1)
    assert check(lambda z, y: F.cross_entropy(z, y, ignore_index=-1), torch.nn.CrossEntropyLoss(), ignore_index=-1).same


def test_a_reference_that_was_changed_is_asked_anew() -> None:
    reference = torch.nn.CrossEntropyLoss()
    assert check(F.cross_entropy, reference, num_classes=(2, 10)).objective == "identical"
    reference.label_smoothing = 0.1
    assert check(F.cross_entropy, reference, num_classes=(2, 10)).objective == "different"


def test_a_maximum_that_is_not_detached_is_honest_behind_a_linear_layer() -> None:
    def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = hidden @ weight.T
        shifted = logits - logits.max(1, keepdim=True).values
        return (shifted.exp().sum(1).log() - shifted.gather(1, labels[:, None])[:, 0]).mean()

    assert check(fused, args=("hidden", "weight", "labels")).same
