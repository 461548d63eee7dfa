"""Mean cross-entropy and its gradient in 50 digits, computed by mpmath without any code of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mpmath
import torch
from torch import Tensor

DIGITS = 50


@dataclass(frozen=True)
class Exact:
    """Mean cross-entropy, rounded once to float64.

    Attributes
    ----------
    value : float
        Mean cross-entropy in nats.
    gradient : Tensor [N, C]
        Gradient with respect to the logits, in float64.
    """

    value: float
    gradient: Tensor


def cross_entropy(logits: Sequence[Sequence[float]], targets: Sequence[Sequence[float]]) -> Exact:
    """Compute the mean over rows of -sum_c y_c log p_c with p = softmax(z), and its gradient (p sum_c y_c - y) / N.

    Parameters
    ----------
    logits : sequence of sequence of float
        N rows of C logits.
    targets : sequence of sequence of float
        N rows of C target probabilities.

    Returns
    -------
    Exact
        Value in nats and gradient.

    Examples
    --------
    >>> cross_entropy([[0.0, 0.0]], [[1.0, 0.0]]).gradient.tolist()
    [[-0.5, 0.5]]
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
