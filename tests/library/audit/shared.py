"""Settings that tests of the audit share, and `check` on few classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from likelihood_lab import Finding, check

NARROW = (2, 10)
FUSED = ("hidden", "weight", "labels")
FUSED_BIAS = ("hidden", "weight", "bias", "labels")
ON_TARGETS = ("logits", "target_probs")
SOFT: dict[str, Any] = {"reference_args": ON_TARGETS, "soft_targets": True}
SUM = partial(F.cross_entropy, reduction="sum")


def quick(fn: Callable[..., Any], reference: Callable[..., Any] = F.cross_entropy, **settings: Any) -> Finding:
    """`check` on few classes."""
    return check(fn, reference, **({"num_classes": NARROW} | settings))


def plain_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)


def with_bias(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


def logit_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of mean cross-entropy with respect to the logits, for autograd functions by hand."""
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1]).to(logits.dtype)) / len(labels)


def smoothed_where(
    condition: Callable[[Tensor, Tensor], Any], amount: float = 1e-3
) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy with label smoothing under a condition, exact otherwise."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=amount if condition(logits, labels) else 0.0)

    return loss


def forward_of_cross_entropy(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Forward of an autograd function that saves its inputs."""
    ctx.save_for_backward(logits, labels)
    return F.cross_entropy(logits, labels)
