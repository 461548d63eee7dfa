"""The objective axis: gradients in, findings out. What rounding may do, and what is left when it is allowed for.

Errors are absolute and per row. Their unit is what floating point must cost: the larger of the reference's own error
in that row and u (1 + M + sqrt(C)) s, where u is the unit roundoff, M the largest |logit| or |log-probability| of the
row (a common shift or p - 1 rounds by that much, whoever computes it), sqrt(C) what a sum of C terms in plain order is
expected to be off by (Higham and Mary 2019), and s the row's weight in the objective, 1/N for a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

CONSTANT = 12.0
"""A row passes while its error is at most this many units; see experiments/audit for the curve behind the number."""
SYSTEMATIC = 2.5
"""The largest ratio of a mean residual, squared, to its variance that is still noise."""
DETERMINED = 1e-3
"""A scale counts where rounding leaves it uncertain by less than this, relative to itself."""
DETERMINED_ROUNDOFFS = 200
"""Or by less than so many units of roundoff: a tenth in float16, two fifths in bfloat16, which knows no better."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next larger number: 1.1e-16 for float64, 6.0e-8 for float32."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Rows:
    """What a batch's rows allow, from its logits in float64; shapes [N], or [N, C] where said.

    Attributes:
        probs: softmax of the logits, [N, C].
        magnitude: M.
        surprise: -log p_y; the expected one where targets are soft.
        weight: s, the row's weight in the reference's objective.
    """

    probs: Tensor
    targets: Tensor
    magnitude: Tensor
    surprisal: Tensor
    weight: Tensor

    @property
    def reach(self) -> Tensor:
        """1 + M + sqrt(C): how many units of roundoff a log-probability may be off by."""
        return 1 + self.magnitude + math.sqrt(self.probs.shape[1])


def rows_of(
    logits: Tensor, targets: Tensor, valid: Tensor, gradient: Tensor | None, size: Tensor | None = None
) -> Rows:
    """Describe rows by their logits [N, C], target probabilities [N, C] and the reference's gradient [N, C].

    Args:
        gradient: where given, the row's weight is read off it: <g, p - y> / <p - y, p - y>, at least 1 / N.
        size: sums of |terms| behind each logit [N, C], where the logits are themselves computed in the precision.
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
    """The unit of each row of the gradient with respect to `name`: [N] for logits and hidden, [C] for weight and bias.

    An error of log p moves p by p times as much: behind a linear layer the units of the logits are carried on by p + y.
    """
    row = u * rows.reach * rows.weight
    if name == "logits":
        return row
    largest = torch.nn.functional.one_hot(
        rows.probs.argmax(1), rows.probs.shape[1]
    )  # what a maximum subtracted sums up
    share = rows.probs + rows.targets + largest
    if name == "hidden":
        return row * (share @ cast(Tensor, weight).abs()).amax(1)
    if name == "bias":
        return share.T @ row
    return share.T @ (row * cast(Tensor, hidden).abs().amax(1))


def row_errors(gradient: Tensor, exact: Tensor) -> Tensor:
    """The largest |error| of each row, [N]; inf where something is not finite and should be."""
    error = (gradient - exact).abs().flatten(1) if gradient.ndim > 1 else (gradient - exact).abs()[:, None]
    return torch.where(error.isnan(), math.inf, error).amax(1)


def in_units(errors: Tensor, unit: Tensor) -> Tensor:
    """Errors in units; 0 for no error, whatever the unit."""
    return torch.where(errors == 0, 0.0, errors / unit.clamp_min(torch.finfo(torch.float64).tiny))


@dataclass(frozen=True)
class ScaleInterval:
    """The factor between two gradients, and how far rounding may have moved it."""

    factor: float
    tolerance: float
    enough: float = DETERMINED  # how uncertain it may be, relative to itself

    @property
    def determined(self) -> bool:
        """Whether rounding leaves the factor known."""
        return math.isfinite(self.factor) and self.tolerance < self.enough * abs(self.factor)


UNKNOWN_SCALE = ScaleInterval(math.nan, math.inf)


def scale(gradient: Tensor, exact: Tensor, tolerance: Tensor, u: float = 0.0) -> ScaleInterval:
    """a = <g_B, g> / <g, g>, with the reach that per-row tolerances [N] of g_B, in g's own size, give it."""
    square = exact.square().sum()
    if not square > 0:
        return UNKNOWN_SCALE
    factor = ((gradient * exact).sum() / square).item()
    spread = exact.abs().flatten(1).sum(1) if exact.ndim > 1 else exact.abs()
    reach = (spread * tolerance).sum() / square
    return ScaleInterval(factor, abs(factor) * reach.item(), max(DETERMINED, DETERMINED_ROUNDOFFS * u))


def overlap(intervals: Sequence[ScaleInterval]) -> bool:
    """Whether one constant lies in all of them."""
    lowest = max((i.factor - i.tolerance for i in intervals), default=0.0)
    return lowest <= min((i.factor + i.tolerance for i in intervals), default=0.0)


def narrowest(intervals: Sequence[ScaleInterval]) -> ScaleInterval:
    """The interval that says most."""
    return min(intervals, key=lambda interval: interval.tolerance / abs(interval.factor))


def systematic(residuals: Tensor) -> float:
    """|mean|^2 / (var / n) of residuals [n, ...] over n roundings of one input: about 1 for noise.

    The mean and the variance are summed over the entries first, so that entries without noise do not decide.
    """
    n = residuals.shape[0]
    mean, variance = residuals.mean(0), residuals.var(0)
    noise = variance.sum() / n
    return (mean.square().sum() / noise).item() if noise > 0 else (math.inf if mean.any() else 0.0)


def relative_distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; NaN where either is not finite."""
    size = b.double().norm()
    return ((a.double() - b.double()).norm() / size).item() if size > 0 else math.nan
