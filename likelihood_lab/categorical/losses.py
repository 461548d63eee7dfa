"""Ways to write a loss that torch does not ship: the textbook's own, and known confusions of it.

Shapes throughout: `logits`, `log_probs`, `probs` and `target_probs` are [batch, classes], `labels` int64 [batch].
Every function returns a scalar in nats unless it says otherwise. Which inputs each receives is declared beside
it in `conf/loss/`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    r"""Log-likelihood of the batch, log L = sum_i log q(y_i | x_i), in (-inf, 0]; higher is better.

    Source: Goodfellow, Bengio and Courville, *Deep Learning*, section 5.5.
    """
    return log_probs.gather(1, labels[:, None]).sum()


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    """What an optimizer that minimises needs in order to maximise `log_likelihood`; in [0, inf).

    A sum over the batch, not a mean: a batch twice as large weighs twice.
    """
    return -log_likelihood(log_probs, labels)


def negative_log_of_product(probs: Tensor, labels: Tensor) -> Tensor:
    r"""-log prod_i q(y_i | x_i): the likelihood as first written down, before the logarithm is moved inside.

    Equal to `negative_log_likelihood` in real arithmetic. In float32 the product of B probabilities underflows
    to 0 once it falls below 1e-45 (64 guesses among 10 classes: 1e-64), and the value is then inf.
    """
    return -probs.gather(1, labels[:, None]).prod().log()


def nll_of_log_of_softmax(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log(softmax(z))_y with the logarithm taken of the rounded probability.

    inf where the probability underflows: in float32 from a logit gap of about 103.
    """
    return F.nll_loss(probs.log(), labels)


def nll_by_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of log(sum_j exp z_j) - z_y: cross-entropy from the logits by its definition; in [0, inf)."""
    return (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()


def cross_entropy_by_logsumexp(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Batch mean of -sum_j y_j log q_j = log(sum_j exp z_j) - sum_j y_j z_j, as sum_j y_j = 1; in [0, inf)."""
    return (logits.logsumexp(1) - (target_probs * logits).sum(1)).mean()


def literal_kl_divergence(probs: Tensor, target_probs: Tensor) -> Tensor:
    r"""Batch mean of D_KL(y || q) = -sum_j y_j log(q_j / y_j), computed exactly as it is written.

    True by the convention 0 log 0 = 0, which the formula does not state: with a zero in `target_probs` it is
    0 * log(q / 0) = 0 * inf = NaN, that is, for every one-hot label.
    """
    return -(target_probs * (probs / target_probs).log()).sum(1).mean()


def reverse_kl_divergence(log_probs: Tensor, target_probs: Tensor, floor: float = 1e-6) -> Tensor:
    r"""Batch mean of D_KL(q || y) = sum_j q_j (log q_j - log y_j), the divergence with its arguments swapped.

    Args:
        floor: smallest target probability; D_KL(q || y) is infinite where y_j = 0 < q_j.
    """
    return (log_probs.exp() * (log_probs - target_probs.clamp_min(floor).log())).sum(1).mean()


def brier_score(probs: Tensor, target_probs: Tensor) -> Tensor:
    r"""Batch mean of sum_j (q_j - y_j)^2, in [0, 2] and without unit: another proper scoring rule."""
    return torch.square(probs - target_probs).sum(1).mean()
