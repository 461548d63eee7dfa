"""Losses that torch does not have: formulas of the textbook, and known mistakes in writing them.

In all functions `logits`, `log_probs`, `probs` and `target_probs` have the shape [B, C], and `labels` are int64 [B].
Every function returns a scalar; its unit is nats unless the docstring says otherwise. The files in `conf/loss/` declare
the inputs of each function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Compute the log-likelihood of the batch, log L = sum_i log q(y_i | x_i), in (-inf, 0]. Higher is better.

    References
    ----------
    Goodfellow, Bengio and Courville, *Deep Learning*, section 5.5.

    Examples
    --------
    >>> log_likelihood(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])).item()
    -0.6931471824645996
    """
    return log_probs.gather(1, labels[:, None]).sum()


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Compute -log L, the negative of `log_likelihood`, in [0, inf). Minimising it maximises the likelihood.

    It is a sum over the batch, not a mean. It doubles if the batch doubles.
    """
    return -log_likelihood(log_probs, labels)


def negative_log_of_product(probs: Tensor, labels: Tensor) -> Tensor:
    """Compute -log prod_i q(y_i | x_i), the logarithm of the product of likelihoods, in [0, inf].

    It equals `negative_log_likelihood` in real arithmetic. In float32 a product below 1e-45 underflows to 0, and the
    value is then inf. Example: 64 uniform predictions among 10 classes have the product 1e-64.
    """
    return -probs.gather(1, labels[:, None]).prod().log()


def nll_of_log_of_softmax(probs: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean of -log(softmax(z))_y, where the logarithm is that of the rounded probability, in [0, inf].

    The value is inf if a probability underflows: in float32 from a logit gap of about 103.
    """
    return F.nll_loss(probs.log(), labels)


def nll_by_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean of log(sum_j exp z_j) - z_y, the definition of cross-entropy, in [0, inf)."""
    return (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()


def cross_entropy_by_logsumexp(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Compute the mean of -sum_j y_j log q_j as log(sum_j exp z_j) - sum_j y_j z_j, in [0, inf), for sum_j y_j = 1."""
    return (logits.logsumexp(1) - (target_probs * logits).sum(1)).mean()


def literal_kl_divergence(probs: Tensor, target_probs: Tensor) -> Tensor:
    """Compute the mean of D_KL(y || q) = -sum_j y_j log(q_j / y_j) exactly as the formula is written, in [0, inf).

    The formula needs the convention 0 log 0 = 0, which this code does not apply. A zero in `target_probs`, as in every
    one-hot label, gives 0 * log(q / 0) = 0 * inf = NaN.
    """
    return -(target_probs * (probs / target_probs).log()).sum(1).mean()


def reverse_kl_divergence(log_probs: Tensor, target_probs: Tensor, floor: float = 1e-6) -> Tensor:
    """Compute the mean of D_KL(q || y) = sum_j q_j (log q_j - log y_j), the divergence with swapped arguments.

    Parameters
    ----------
    log_probs : Tensor [B, C]
        log q.
    target_probs : Tensor [B, C]
        Target probabilities y.
    floor : float
        Lower limit of y_j. Without it, D_KL(q || y) is infinite if y_j = 0 < q_j.
    """
    return (log_probs.exp() * (log_probs - target_probs.clamp_min(floor).log())).sum(1).mean()


def brier_score(probs: Tensor, target_probs: Tensor) -> Tensor:
    """Compute the mean of sum_j (q_j - y_j)^2, in [0, 2], without a unit. It is a proper scoring rule.

    References
    ----------
    Brier (1950), Monthly Weather Review 78, 1-3.
    """
    return torch.square(probs - target_probs).sum(1).mean()
