"""Metrics computed alike for every arm, from the logits in float64, as sums over examples.

A mean of batch means would weigh the examples of a short last batch more than the others, so the sums travel and
are divided once, by the number of examples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 15
NAMES = ("nll", "accuracy", "brier", "ece", "kl_truth")


class MetricSums:
    r"""Per-replica means over all examples seen, from logits [R, B, C] and target probabilities [B, C].

    nll       mean of -sum_j y_j log q_j in nats, in [0, inf); the cross-entropy where labels are soft.
    accuracy  share of examples whose most probable class is the label, in [0, 1].
    brier     mean of sum_j (q_j - y_j)^2, in [0, 2].
    ece       top-label calibration error, sum_b n_b/n |accuracy_b - confidence_b| over 15 equal bins, in [0, 1]
              (Guo et al. 2017, arXiv:1706.04599). Shown, never judged: it is not a proper score.
    kl_truth  mean of D_KL(P || q) = sum_j P_j log(P_j / q_j) in nats, in [0, inf); only where P(y | x) is known.

    All are NaN for a replica that gave a non-finite logit.
    """

    def __init__(self, num_replicas: int, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}  # over examples, each [R]
        self.bins = torch.zeros(num_replicas, NUM_BINS, 2, dtype=torch.float64, device=device)
        self.finite = torch.ones(num_replicas, dtype=torch.bool, device=device)
        self.count = 0

    def update(self, logits: Tensor, labels: Tensor, target_probs: Tensor, truth: Tensor | None = None) -> None:
        """Add one batch: logits [R, B, C] in any precision, labels [B], target_probs and, where known, truth [B, C]."""
        self.finite &= logits.isfinite().flatten(1).all(1)
        log_probs = F.log_softmax(logits.double(), -1)
        probs, targets = log_probs.exp(), target_probs.double()
        confidence = probs.amax(-1)
        hit = (logits.argmax(-1) == labels).double()  # of the logits: probabilities may round to a tie
        self._add("nll", -_expected(targets, log_probs))
        self._add("accuracy", hit.sum(1))
        self._add("brier", torch.square(probs - targets).sum((1, 2)))
        if truth is not None:
            truth = truth.double()
            self._add("kl_truth", _expected(truth, truth.log() - log_probs))
        bin_index = (confidence * NUM_BINS).nan_to_num().long().clamp(0, NUM_BINS - 1)
        in_bin = F.one_hot(bin_index, NUM_BINS).double()
        self.bins += torch.einsum("rbn,rbk->rnk", in_bin, torch.stack([hit, confidence], -1))
        self.count += labels.numel()

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + values

    def result(self) -> dict[str, Tensor]:
        """The means, each [R], on the CPU."""
        found = {name: total / self.count for name, total in self.sums.items()}
        found["ece"] = (self.bins[..., 0] - self.bins[..., 1]).abs().sum(1) / self.count
        return {name: found[name].masked_fill(~self.finite, torch.nan).cpu() for name in NAMES if name in found}


def _expected(probs: Tensor, values: Tensor) -> Tensor:
    """Sum over examples of sum_j p_j v_j, [R]; 0 log 0 = 0: an impossible class costs nothing, whatever its value."""
    return torch.where(probs > 0, probs * values, 0.0).sum((1, 2))
