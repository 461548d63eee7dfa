"""Planted faults that a plain grid of batches misses: each is cross-entropy except in one situation.

Each takes logits [N, C] and labels int64 [N] and returns a scalar in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = 1e-3  # label smoothing of a faulty batch
NOISE = 1e-7
CALLS = 30  # after which a loss changes
MANY_ROWS = 64
MANY_CLASSES = 10


class _UpstreamIgnored(torch.autograd.Function):
    """Cross-entropy whose backward returns (p - y) / N and ignores the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward((logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(labels))
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def ignores_upstream(logits: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = _UpstreamIgnored.apply(logits, labels)
    return loss


class ChangesAfterCalls:
    """Cross-entropy for the first `CALLS` calls, then with label smoothing."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING if self.calls > CALLS else 0.0)


def overwrites_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Subtract each row's maximum in place, which does not change the gradient."""
    loss = F.cross_entropy(logits.clone(), labels)
    with torch.no_grad():
        logits -= logits.amax(1, keepdim=True)
    return loss


def overwrites_labels(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, labels.clone())
    labels.fill_(0)
    return loss


def adds_input_noise(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits + NOISE * torch.randn_like(logits), labels)


def _where(wrong: Callable[[Tensor, Tensor], bool]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss with label smoothing on batches for which `wrong` is true."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING if wrong(logits, labels) else 0.0)

    return loss


def last_class_smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Apply label smoothing to the rows of the last class only."""
    plain = F.cross_entropy(logits, labels, reduction="none")
    smoothed = F.cross_entropy(logits, labels, reduction="none", label_smoothing=SMOOTHING)
    return torch.where(labels == logits.shape[1] - 1, smoothed, plain).mean()


@dataclass(frozen=True)
class Planted:
    """A planted fault.

    Attributes:
        make: returns a fresh loss, because some count their calls.
        objective: the expected word.
        side_effects: beginnings of the expected side effects.
    """

    title: str
    make: Callable[[], Callable[[Tensor, Tensor], Tensor]]
    objective: str = "different"
    side_effects: tuple[str, ...] = ()


def _fault(title: str, fn: Callable[[Tensor, Tensor], Tensor], **more: Any) -> Planted:
    return Planted(title, lambda: fn, **more)


BLIND_SPOTS = (
    _fault("ignores the upstream gradient", ignores_upstream),
    Planted(f"changes after {CALLS} calls", ChangesAfterCalls, side_effects=("equal calls differ",)),
    _fault("overwrites its logits", overwrites_logits, objective="identical", side_effects=("overwrites logits",)),
    _fault("adds input noise 1e-7", adds_input_noise, side_effects=("consumes random numbers", "equal calls differ")),
    _fault("wrong for B > 64", _where(lambda logits, _: len(logits) > MANY_ROWS)),
    _fault("wrong for B = 1", _where(lambda logits, _: len(logits) == 1)),
    _fault("wrong for C > 10", _where(lambda logits, _: logits.shape[1] > MANY_CLASSES)),
    _fault("wrong for the last class", last_class_smoothed),
    _fault("wrong on inputs that are not contiguous", _where(lambda logits, _: not logits.is_contiguous())),
    _fault("wrong in float32", _where(lambda logits, _: logits.dtype == torch.float32)),
    _fault("wrong in float64", _where(lambda logits, _: logits.dtype == torch.float64)),
    _fault("overwrites its labels", overwrites_labels, objective="identical", side_effects=("overwrites labels",)),
)
