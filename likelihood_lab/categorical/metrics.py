"""Metrics of a classifier, computed from the logits in float64 in the same way for every loss.

Sums over examples are accumulated and divided once by the number of examples. A mean of batch means would give the
examples of a short last batch more weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 15


class MetricSums:
    """Accumulator of the metrics of R replicas over batches. A replica with a non-finite logit gets NaN.

    Notes
    -----
    nll       mean of -sum_j y_j log q_j in nats, in [0, inf); the cross-entropy if labels are soft.
    accuracy  share of examples whose most probable class is the label, in [0, 1].
    brier     mean of sum_j (q_j - y_j)^2, in [0, 2].
    ece       top-label calibration error, sum_b n_b/n |accuracy_b - confidence_b| over 15 equal bins, in [0, 1]. It is
              not a proper score and never decides.
    kl_truth  mean of D_KL(P || q) = sum_j P_j log(P_j / q_j) in nats, in [0, inf); only if P(y | x) is known.

    References
    ----------
    Guo et al. (2017), arXiv:1706.04599, for the calibration error.

    Examples
    --------
    >>> metrics = MetricSums(num_replicas=1, device=torch.device("cpu"))
    >>> metrics.update(torch.zeros(1, 1, 2), torch.tensor([0]), torch.tensor([[1.0, 0.0]]))
    >>> metrics.result()["brier"].tolist()
    [0.5]
    """

    def __init__(self, num_replicas: int, device: torch.device) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> sum over examples [R]
        self.bins = torch.zeros(num_replicas, NUM_BINS, 2, dtype=torch.float64, device=device)
        self.finite = torch.ones(num_replicas, dtype=torch.bool, device=device)
        self.count = 0

    def update(self, logits: Tensor, labels: Tensor, target_probs: Tensor, truth: Tensor | None = None) -> None:
        """Add one batch.

        Parameters
        ----------
        logits : Tensor [R, B, C]
            Logits in any precision.
        labels : Tensor [B]
            Labels, int64.
        target_probs : Tensor [B, C]
            Target probabilities.
        truth : Tensor [B, C], optional
            P(y | x), if it is known.
        """
        self.finite &= logits.isfinite().flatten(1).all(1)
        log_probs = F.log_softmax(logits.double(), -1)
        probs, targets = log_probs.exp(), target_probs.double()
        confidence = probs.amax(-1)
        hit = (logits.argmax(-1) == labels).double()  # from the logits, as probabilities may round to a tie
        self._add("nll", -_expected(targets, log_probs))
        self._add("accuracy", hit.sum(1))
        self._add("brier", torch.square(probs - targets).sum((1, 2)))
        bin_index = (confidence * NUM_BINS).nan_to_num().long().clamp(0, NUM_BINS - 1)
        in_bin = F.one_hot(bin_index, NUM_BINS).double()
        self.bins += torch.einsum("rbn,rbk->rnk", in_bin, torch.stack([hit, confidence], -1))
        self.sums["ece"] = (self.bins[..., 0] - self.bins[..., 1]).abs().sum(1)
        if truth is not None:
            truth = truth.double()
            self._add("kl_truth", _expected(truth, truth.log() - log_probs))
        self.count += labels.numel()

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + values

    def result(self) -> dict[str, Tensor]:
        """Return the mean of each metric [R], in float64 on the CPU."""
        return {
            name: (total / self.count).masked_fill(~self.finite, torch.nan).cpu() for name, total in self.sums.items()
        }


def _expected(probs: Tensor, values: Tensor) -> Tensor:
    """Sum over examples of sum_j p_j v_j, [R]. A term with p_j = 0 is 0 for any v_j."""
    return torch.where(probs > 0, probs * values, 0.0).sum((1, 2))
