"""Losses that are wrong by a known amount d, to measure the detection limit of the audit.

Each mutant takes `logits` [..., C], `target_probs` [..., C] (zero in ignored rows) and d, and returns a scalar in nats.
At d = 0 it is the mean cross-entropy.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Mutant(Protocol):
    """Loss that is wrong by d."""

    def __call__(self, logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
        """Compute the loss."""
        ...


FAULT_SIZES = tuple(m * 10.0**-k for k in range(1, 18) for m in (1.0, 0.3))  # from 1e-1 down
_NEWTON_STEPS = 8


def cross_entropies(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Compute -sum_c y_c log p_c of every row, [...], in nats."""
    return -(target_probs * F.log_softmax(logits, -1)).sum(-1)


def mean_cross_entropy(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Compute the mean cross-entropy over the rows that are not ignored, in nats."""
    return _mean(cross_entropies(logits, target_probs), target_probs)


def _mean(losses: Tensor, target_probs: Tensor) -> Tensor:
    return losses.sum() / (target_probs.sum(-1) > 0).sum()


def label_smoothing(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Replace the targets y by (1 - d) y + d / C."""
    valid = target_probs.sum(-1, keepdim=True)
    mixed = (1 - d) * target_probs + d * valid / logits.shape[-1]
    return _mean(cross_entropies(logits, mixed), target_probs)


def temperature(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Multiply the logits by 1 + d."""
    return _mean(cross_entropies(logits * (1 + d), target_probs), target_probs)


def scale(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Multiply the loss by 1 + d."""
    return _mean(cross_entropies(logits, target_probs), target_probs) * (1 + d)


def z_loss(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Add d (log sum_c exp z_c)^2 to every row."""
    added = d * logits.logsumexp(-1).square() * target_probs.sum(-1)
    return _mean(cross_entropies(logits, target_probs) + added, target_probs)


def class_weight(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Give the last class the weight 1 + d."""
    weights = torch.ones_like(logits[..., 0]) + d * target_probs[..., -1]
    return _mean(cross_entropies(logits, target_probs) * weights, target_probs)


def focal_gamma(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Multiply every row by (1 - p_y)^d. 1 - p_y is computed from log p_y, which is exact for p_y near 1."""
    losses = cross_entropies(logits, target_probs)
    surprisal = losses.clamp_min(torch.finfo(losses.dtype).tiny)
    return _mean((d * torch.log(-torch.expm1(-surprisal))).exp() * losses, target_probs)


def epsilon_in_log(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Replace log p by log(p + d), computed without rounding p."""
    log_probs = F.log_softmax(logits, -1)
    shifted = torch.logaddexp(log_probs, torch.full_like(log_probs, d).log())
    return _mean(-(target_probs * shifted).sum(-1), target_probs)


class _Entmax(torch.autograd.Function):
    """Fenchel-Young loss of (1 + d)-entmax, with the gradient p - y. Its limit for d -> 0 is the cross-entropy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
        tau = logits.logsumexp(-1, keepdim=True)
        for _ in range(_NEWTON_STEPS):  # sum_c (1 + d (z_c - tau))_+^(1/d) = 1
            base = (1 + d * (logits - tau)).clamp_min(0)
            log_p = torch.log1p((d * (logits - tau)).clamp_min(-1)) / d
            mass = log_p.exp().sum(-1, keepdim=True)
            slope = (log_p - base.log()).exp().sum(-1, keepdim=True)
            tau = tau + (mass - 1) / slope
        ctx.save_for_backward(log_p.exp() / log_p.exp().sum(-1, keepdim=True), target_probs)
        return cross_entropies(logits, target_probs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        probs, target_probs = ctx.saved_tensors
        valid = target_probs.sum(-1, keepdim=True)
        return upstream[0][..., None] * (probs * valid - target_probs), None, None


def entmax(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Replace softmax by (1 + d)-entmax. The gradient is correct; the value is still the cross-entropy.

    References
    ----------
    Peters, Niculae and Martins (2019), arXiv:1905.05702.
    """
    losses: Tensor = _Entmax.apply(logits, target_probs, d)
    return _mean(losses, target_probs)


class _Noise(torch.autograd.Function):
    """Identity whose gradient is multiplied by 1 + d r, where r is a fixed pattern of standard normal numbers."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, d: float) -> Tensor:
        ctx.d = d
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        pattern = torch.randn(upstream[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return upstream[0] * (1 + ctx.d * pattern).to(upstream[0]), None


def gradient_noise(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Multiply every entry of the gradient by 1 + d r, where r is standard normal and the same in every call."""
    noisy: Tensor = _Noise.apply(logits, d)
    return _mean(cross_entropies(noisy, target_probs), target_probs)


MUTANTS: dict[str, Mutant] = {
    "label smoothing": label_smoothing,
    "temperature 1 + d": temperature,
    "scale 1 + d": scale,
    "z-loss": z_loss,
    "class weight 1 + d": class_weight,
    "focal gamma": focal_gamma,
    "epsilon in the log": epsilon_in_log,
    "entmax 1 + d": entmax,
    "gradient noise": gradient_noise,
}
