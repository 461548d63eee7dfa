"""The mean cross-entropy and its gradient in 50 digits: the one judge that shares no code with torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mpmath
import torch
from torch import Tensor

DIGITS = 50


@dataclass(frozen=True)
class Exact:
    """Value and gradient [N, C] of the mean cross-entropy, rounded to float64 once."""

    value: float
    gradient: Tensor


def cross_entropy(logits: Sequence[Sequence[float]], targets: Sequence[Sequence[float]]) -> Exact:
    r"""Mean over rows of -sum_c y_c log p_c, p = softmax(z), in nats; its gradient is (p sum_c y_c - y) / N.

    Args:
        logits: N rows of C logits.
        targets: N rows of C target probabilities.
    """
    with mpmath.workdps(DIGITS):
        n = len(logits)
        total, gradient = mpmath.mpf(0), []
        for z, y in zip(logits, targets, strict=True):
            z, y = [mpmath.mpf(x) for x in z], [mpmath.mpf(x) for x in y]
            top, mass = max(z), mpmath.fsum(y)
            powers = [mpmath.exp(x - top) for x in z]
            normaliser = mpmath.fsum(powers)
            log_normaliser = top + mpmath.log(normaliser)
            total += mpmath.fsum(t * (log_normaliser - x) for t, x in zip(y, z, strict=True))
            gradient.append([float((p / normaliser * mass - t) / n) for p, t in zip(powers, y, strict=True)])
        return Exact(float(total / n), torch.tensor(gradient, dtype=torch.float64))
