"""Losses that are wrong by a known amount: how small a difference the audit would have caught.

Each takes logits [..., C] and target_probs [..., C], zero in ignored rows, and is the mean cross-entropy at d = 0.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Mutant(Protocol):
    """A loss that is wrong by d."""

    def __call__(self, logits: Tensor, target_probs: Tensor, d: float) -> Tensor: ...


FAULT_SIZES = tuple(m * 10.0**-k for k in range(1, 18) for m in (1.0, 0.3))  # from 1e-1 down
_NEWTON_STEPS = 8


def cross_entropies(logits: Tensor, target_probs: Tensor) -> Tensor:
    """-sum_c y_c log p_c of every row, [...]."""
    return -(target_probs * F.log_softmax(logits, -1)).sum(-1)


def mean_cross_entropy(logits: Tensor, target_probs: Tensor) -> Tensor:
    """What every mutant is at d = 0."""
    return _mean(cross_entropies(logits, target_probs), target_probs)


def _mean(losses: Tensor, target_probs: Tensor) -> Tensor:
    return losses.sum() / (target_probs.sum(-1) > 0).sum()


def label_smoothing(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Targets mixed with d of the uniform distribution."""
    valid = target_probs.sum(-1, keepdim=True)
    mixed = (1 - d) * target_probs + d * valid / logits.shape[-1]
    return _mean(cross_entropies(logits, mixed), target_probs)


def temperature(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Logits times 1 + d."""
    return _mean(cross_entropies(logits * (1 + d), target_probs), target_probs)


def scale(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """The loss times 1 + d."""
    return _mean(cross_entropies(logits, target_probs), target_probs) * (1 + d)


def z_loss(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """d times the squared log-normaliser added."""
    added = d * logits.logsumexp(-1).square() * target_probs.sum(-1)
    return _mean(cross_entropies(logits, target_probs) + added, target_probs)


def class_weight(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """The last class weighs 1 + d."""
    weights = torch.ones_like(logits[..., 0]) + d * target_probs[..., -1]
    return _mean(cross_entropies(logits, target_probs) * weights, target_probs)


def focal_gamma(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """(1 - p_y)^d times the loss, 1 - p_y taken of the log-probability, so that it is exact near 1 too."""
    losses = cross_entropies(logits, target_probs)
    surprisal = losses.clamp_min(torch.finfo(losses.dtype).tiny)
    return _mean((d * torch.log(-torch.expm1(-surprisal))).exp() * losses, target_probs)


def epsilon_in_log(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """log(p + d) for log p, with no rounding of p."""
    log_probs = F.log_softmax(logits, -1)
    shifted = torch.logaddexp(log_probs, torch.full_like(log_probs, d).log())
    return _mean(-(target_probs * shifted).sum(-1), target_probs)


class _Entmax(torch.autograd.Function):
    """The Fenchel-Young loss of (1 + d)-entmax; its gradient is p - y. Softmax cross-entropy as d goes to 0."""

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
    """(1 + d)-entmax in place of softmax (Peters, Niculae and Martins 2019); right in its gradient, not its value."""
    losses: Tensor = _Entmax.apply(logits, target_probs, d)
    return _mean(losses, target_probs)


class _Noise(torch.autograd.Function):
    """The identity, whose gradient is multiplied by 1 + d r, r a fixed pattern of standard normal numbers."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, d: float) -> Tensor:
        ctx.d = d
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        pattern = torch.randn(upstream[0].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return upstream[0] * (1 + ctx.d * pattern).to(upstream[0]), None


def gradient_noise(logits: Tensor, target_probs: Tensor, d: float) -> Tensor:
    """Every entry of the gradient off by a relative d, at random but the same each time."""
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
