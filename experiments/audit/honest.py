"""Mean cross-entropy in other orders of the same arithmetic. Each form is correct and has its own rounding.

Each takes logits [N, C] and labels int64 [N] and returns a scalar in nats, in the precision of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.audit import summing

HonestForm = Callable[[Tensor, Tensor], Tensor]
Normaliser = Callable[[Tensor], Tensor]

ROWS_AT_ONCE = 16


def _chosen(rows: Tensor, labels: Tensor) -> Tensor:
    """Return the label's entry of each row, [N]."""
    return rows.gather(1, labels[:, None])[:, 0]


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return F.one_hot(labels, logits.shape[1]).to(logits.dtype)


def _from(log_normaliser: Normaliser) -> HonestForm:
    """Mean of log sum_c exp z_c - z_y, the first term from a function of the logits: [N, C] to [N]."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (log_normaliser(logits) - _chosen(logits, labels)).mean()

    return loss


def _summed(total: Normaliser) -> HonestForm:
    """Mean of log sum_c exp(z_c - max) + max - z_y, the sum over classes from a function: [N, C] to [N]."""

    def log_normaliser(logits: Tensor) -> Tensor:
        top = logits.detach().amax(1, keepdim=True)
        return total((logits - top).exp()).log() + top[:, 0]

    return _from(log_normaliser)


# whole losses


def nll_of_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits, 1), labels)


def log_softmax_along_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute log_softmax of the transposed logits along dimension 0, where torch sums the classes one by one."""
    return -_chosen(F.log_softmax(logits.T.contiguous(), 0).T, labels).mean()


def log_softmax_twice(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.log_softmax(logits, 1), labels)


def log_of_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return -_chosen(logits.softmax(1).log(), labels).mean()


def log_of_chosen_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return -_chosen(logits.softmax(1), labels).log().mean()


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """-logsigmoid(z_y - logsumexp of the others)."""
    others = logits.masked_fill(_one_hot(logits, labels).bool(), -math.inf).logsumexp(1)
    return -F.logsigmoid(_chosen(logits, labels) - others).mean()


def differences_to_the_label(logits: Tensor, labels: Tensor) -> Tensor:
    """logsumexp(z - z_y)."""
    return (logits - _chosen(logits, labels)[:, None]).logsumexp(1).mean()


def one_hot_product(logits: Tensor, labels: Tensor) -> Tensor:
    return -(_one_hot(logits, labels) * F.log_softmax(logits, 1)).sum(1).mean()


def one_hot_einsum(logits: Tensor, labels: Tensor) -> Tensor:
    return -torch.einsum("nc,nc->", _one_hot(logits, labels), F.log_softmax(logits, 1)) / len(labels)


def one_hot_targets(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, _one_hot(logits, labels))


def kl_divergence(logits: Tensor, labels: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), _one_hot(logits, labels), reduction="batchmean")


def sum_over_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum") / len(labels)


def mean_of_rows_divided_first(logits: Tensor, labels: Tensor) -> Tensor:
    return (F.cross_entropy(logits, labels, reduction="none") / len(labels)).sum()


def row_by_row(logits: Tensor, labels: Tensor) -> Tensor:
    pairs = zip(logits.split(1), labels.split(1), strict=True)
    return reduce(torch.add, [F.cross_entropy(z, y) for z, y in pairs]) / len(labels)


def rows_in_blocks(logits: Tensor, labels: Tensor) -> Tensor:
    pairs = zip(logits.split(ROWS_AT_ONCE), labels.split(ROWS_AT_ONCE), strict=True)
    return reduce(torch.add, [F.cross_entropy(z, y, reduction="sum") for z, y in pairs]) / len(labels)


def classes_from_the_last(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flip(1), logits.shape[1] - 1 - labels)


def classes_shuffled(logits: Tensor, labels: Tensor) -> Tensor:
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(11))
    return F.cross_entropy(logits[:, order], order.argsort()[labels])


def classes_sorted(logits: Tensor, labels: Tensor) -> Tensor:
    ordered, order = logits.sort(1)
    place = (order == labels[:, None]).to(torch.int8).argmax(1)
    return F.cross_entropy(ordered, place)


def in_float64(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.double(), labels).to(logits.dtype)


def in_float32(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels).to(logits.dtype)


class _Analytic(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in forward as softmax(z) - y."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, one_hot: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(1) - one_hot)
        return logits.logsumexp(1) - (logits * one_hot).sum(1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * upstream[0][:, None], None


def analytic_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    losses: Tensor = _Analytic.apply(logits, _one_hot(logits, labels))
    return losses.mean()


FORMS: dict[str, HonestForm] = {
    "nll_loss of log_softmax": nll_of_log_softmax,
    "log_softmax along dimension 0": log_softmax_along_rows,
    "log_softmax twice": log_softmax_twice,
    "log of softmax": log_of_softmax,
    "log of softmax at the label": log_of_chosen_softmax,
    "logsumexp": _from(lambda z: z.logsumexp(1)),
    "logcumsumexp": _from(summing.running_logcumsumexp),
    "logaddexp in halves": _from(summing.logaddexp_in_halves),
    "logaddexp one by one": _from(summing.logaddexp_one_by_one),
    "logsumexp of blocks of classes": _from(summing.of_blocks),
    "online softmax": _from(summing.online),
    "exp2 and log2": _from(summing.base_two),
    "log1p of the other classes": _from(summing.log1p_of_others),
    "shifted by the middle of the row": _from(summing.shifted_by_the_middle),
    "exp summed": _summed(lambda terms: terms.sum(1)),
    "exp summed one by one": _summed(summing.one_by_one),
    "exp summed from the last": _summed(summing.from_the_last),
    "exp summed, smallest first": _summed(summing.smallest_first),
    "exp summed one by one, largest first": _summed(summing.largest_first_one_by_one),
    "exp summed in halves": _summed(summing.in_halves),
    "exp summed by a dot product": _summed(summing.dot_product),
    "exp summed in blocks": _summed(summing.in_blocks),
    "exp summed by einsum": _summed(lambda terms: torch.einsum("nc->n", terms)),
    "log odds": log_odds,
    "differences to the label": differences_to_the_label,
    "one-hot product": one_hot_product,
    "one-hot einsum": one_hot_einsum,
    "one-hot targets": one_hot_targets,
    "KL divergence": kl_divergence,
    "sum over N": sum_over_rows,
    "rows divided by N, then summed": mean_of_rows_divided_first,
    "row by row": row_by_row,
    "blocks of rows": rows_in_blocks,
    "classes from the last": classes_from_the_last,
    "classes shuffled": classes_shuffled,
    "classes sorted": classes_sorted,
    "float32 and back": in_float32,
    "float64 and back": in_float64,
    "gradient softmax - y by hand": analytic_gradient,
}
