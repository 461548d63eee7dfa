"""Settings that tests of the audit share, and `check` on few classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab import Finding, check
from likelihood_lab.categorical.inputs import LossFn

NARROW = (2, 10)
FUSED = ("hidden", "weight", "labels")
FUSED_BIAS = ("hidden", "weight", "bias", "labels")
ON_TARGETS = ("logits", "target_probs")
SOFT: dict[str, Any] = {"reference_args": ON_TARGETS, "soft_targets": True}
SUM = partial(F.cross_entropy, reduction="sum")


def quick(fn: LossFn, reference: LossFn = F.cross_entropy, **settings: Any) -> Finding:
    """`check` on few classes."""
    return check(fn, reference, **({"num_classes": NARROW} | settings))


def plain_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)


def with_bias(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def logit_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of mean cross-entropy with respect to the logits, for autograd functions by hand."""
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1]).to(logits.dtype)) / len(labels)


def smoothed_where(condition: Callable[[Tensor, Tensor], Any], amount: float = 1e-3) -> LossFn:
    """Cross-entropy with label smoothing under a condition, exact otherwise."""
    return lambda z, y: F.cross_entropy(z, y, label_smoothing=amount if condition(z, y) else 0.0)


def by_hand(backward: Callable[[Any, Tensor], Tensor]) -> LossFn:
    """Mean cross-entropy whose gradient is `backward(ctx, upstream)`; ctx has saved_tensors and a count of calls."""

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
            ctx.save_for_backward(logits, labels)
            ctx.calls = 0
            return F.cross_entropy(logits, labels)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
            ctx.calls += 1
            return backward(ctx, upstream[0]), None

    return ByHand.apply
