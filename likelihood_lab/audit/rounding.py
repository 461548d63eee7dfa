"""The rounding model: the error that floating point must cause in each row of a gradient.

Errors are absolute, one for each row. Their unit is the larger of two numbers: the reference's own error in that row,
and u (1 + M + sqrt(C)) s. Here u is the unit roundoff. M is the largest |logit| or |log-probability| of the row: a
common shift, or p - 1, rounds by that much in any implementation. sqrt(C) is the expected error of a sum of C terms in
plain order (Higham and Mary 2019). s is the row's weight in the objective, 1/N for a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

CONSTANT = 12.0
"""A row passes if its error is at most this many units; experiments/audit measures how the number was chosen."""
SYSTEMATIC = 2.5
"""Residuals are noise if their squared mean is less than this many times its variance."""
DETERMINED = 1e-3
"""A scale is determined if its relative uncertainty from rounding is less than this."""
DETERMINED_ROUNDOFFS = 200
"""Or less than this many unit roundoffs: 0.1 in float16, 0.8 in bfloat16, whose gradients are no sharper."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return half the distance from 1 to the next larger number: 1.1e-16 for float64, 6.0e-8 for float32."""
    return torch.finfo(dtype).eps / 2


def name_of(dtype: torch.dtype) -> str:
    """Return the dtype's name without its module, such as "float32"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Rows:
    """Properties of a batch's rows that decide their rounding units, from its logits in float64.

    Attributes
    ----------
    probs: softmax of the logits, [N, C].
    targets: target probabilities, [N, C].
    magnitude: M, [N].
    surprisal: -log p_y in nats, [N]; its expectation if targets are soft.
    weight: s, the row's weight in the reference's objective, [N].
    """

    probs: Tensor
    targets: Tensor
    magnitude: Tensor
    surprisal: Tensor
    weight: Tensor

    @property
    def reach(self) -> Tensor:
        """1 + M + sqrt(C): the error of a log-probability in unit roundoffs."""
        return 1 + self.magnitude + math.sqrt(self.probs.shape[1])


def rows_of(
    logits: Tensor, targets: Tensor, valid: Tensor, gradient: Tensor | None, size: Tensor | None = None
) -> Rows:
    """Describe rows by their logits [N, C], target probabilities [N, C] and the reference's gradient [N, C].

    Args:
        gradient: if given, it determines the row's weight: <g, p - y> / <p - y, p - y>, at least 1 / N.
        size: sums of |terms| of each logit [N, C], if the logits are themselves computed in the precision.
    """
    log_probs = logits.log_softmax(1)
    finite = logits.isfinite()
    largest = torch.where(finite, logits.abs() if size is None else size, 0.0).amax(1)
    largest = torch.maximum(largest, torch.where(finite, log_probs.abs(), 0.0).amax(1))
    probs = log_probs.exp()
    surprisal = -torch.where(targets > 0, targets * log_probs, 0.0).sum(1)
    weight = torch.full_like(largest, 1 / max(1, int(valid.sum())))
    if gradient is not None:
        direction = probs - targets
        read = (gradient * direction).sum(1).abs() / direction.square().sum(1)
        weight = torch.maximum(weight, torch.where(read.isfinite(), read, 0.0))
    return Rows(probs, targets, largest, surprisal, weight)


def units(rows: Rows, u: float, name: str, hidden: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Return the unit of each row of the gradient by `name`: [N] for logits and hidden, [C] for weight and bias.

    An error in log p changes p by p times as much. A linear layer therefore multiplies the units of the logits by
    p + y, plus 1 at the largest class: its logit is subtracted from all others.
    """
    row = u * rows.reach * rows.weight
    if name == "logits":
        return row
    largest = torch.nn.functional.one_hot(rows.probs.argmax(1), rows.probs.shape[1])
    share = rows.probs + rows.targets + largest
    if name == "hidden":
        return row * (share @ cast(Tensor, weight).abs()).amax(1)
    if name == "bias":
        return share.T @ row
    return share.T @ (row * cast(Tensor, hidden).abs().amax(1))


def row_errors(gradient: Tensor, exact: Tensor) -> Tensor:
    """Return the largest |error| of each row, [N]; inf if an entry is NaN or infinite."""
    error = (gradient - exact).abs().flatten(1) if gradient.ndim > 1 else (gradient - exact).abs()[:, None]
    return torch.where(error.isnan(), math.inf, error).amax(1)


def in_units(errors: Tensor, unit: Tensor) -> Tensor:
    """Return errors in units; 0 for an error of 0, even if the unit is 0."""
    return torch.where(errors == 0, 0.0, errors / unit.clamp_min(torch.finfo(torch.float64).tiny))


@dataclass(frozen=True)
class ScaleInterval:
    """The factor between two gradients, and the largest change of it that rounding explains.

    Attributes
    ----------
    enough: the relative uncertainty below which the factor is determined.
    """

    factor: float
    tolerance: float
    enough: float = DETERMINED

    @property
    def determined(self) -> bool:
        """True if the factor is known in spite of rounding."""
        return math.isfinite(self.factor) and self.tolerance < self.enough * abs(self.factor)


UNKNOWN_SCALE = ScaleInterval(math.nan, math.inf)


def scale(gradient: Tensor, exact: Tensor, tolerance: Tensor, u: float = 0.0) -> ScaleInterval:
    """Return the scale a = <g_B, g> / <g, g> and its tolerance.

    The tolerance of a is computed from the per-row tolerances [N] of g_B, which are given on the scale of g.
    """
    square = exact.square().sum()
    if not square > 0:
        return UNKNOWN_SCALE
    factor = ((gradient * exact).sum() / square).item()
    spread = exact.abs().flatten(1).sum(1) if exact.ndim > 1 else exact.abs()
    reach = (spread * tolerance).sum() / square
    return ScaleInterval(factor, abs(factor) * reach.item(), max(DETERMINED, DETERMINED_ROUNDOFFS * u))


def overlap(intervals: Sequence[ScaleInterval]) -> bool:
    """Return whether one constant lies in all intervals."""
    lowest = max((i.factor - i.tolerance for i in intervals), default=0.0)
    return lowest <= min((i.factor + i.tolerance for i in intervals), default=0.0)


def narrowest(intervals: Sequence[ScaleInterval]) -> ScaleInterval:
    """Return the interval with the smallest relative tolerance."""
    return min(intervals, key=lambda interval: interval.tolerance / abs(interval.factor))


def systematic(residuals: Tensor) -> float:
    """Return |mean|^2 / (var / n) of residuals [n, ...] over n roundings of one input: about 1 for noise.

    The mean and the variance are summed over the entries first, so that entries without noise do not dominate.
    """
    n = residuals.shape[0]
    mean, variance = residuals.mean(0), residuals.var(0)
    noise = variance.sum() / n
    return (mean.square().sum() / noise).item() if noise > 0 else (math.inf if mean.any() else 0.0)


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return ||a - b|| / ||b||; NaN if either is not finite, or if b is 0."""
    size = b.double().norm()
    return ((a.double() - b.double()).norm() / size).item() if size > 0 else math.nan
