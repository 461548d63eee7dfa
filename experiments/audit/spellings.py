"""Losses from practice, right and wrong: the candidates and references of the catalogue.

By default logits, log_probs, probs and target_probs are [N, C], labels int64 [N], and the result is a scalar in nats.
Formulas: z logits, p = softmax(z), y target probabilities, l = -log p_y a row's loss, w class weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = 0.1
TEMPERATURE = 4.0
ACCUMULATION = 8  # intended micro-batches of an accumulation window
MICRO_BATCH = 5  # rows in each of them
NUM_ITEMS = 64  # valid tokens of a whole window
NAMED_CLASS = 3  # a real class whose index is also the `ignore_index`
CHUNK = 16  # rows of logits that a fused loss has in memory at once


# Kullback-Leibler divergences


def kl_mean_of_elements(log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """sum y (log y - log p) / (N C): `kl_div` with its default reduction, without its warning."""
    return F.kl_div(log_probs, target_probs, reduction="none").mean()


def kl_of_swapped_arguments(probs: Tensor, target_probs: Tensor) -> Tensor:
    """kl_div(log y, p) = D_KL(p; y) summed, over N; y floored at 1e-6."""
    return F.kl_div(target_probs.clamp_min(1e-6).log(), probs, reduction="batchmean")


def kl_of_bare_swap(probs: Tensor, target_probs: Tensor) -> Tensor:
    """kl_div(y, p): sum p (log p - y) / N, which is no divergence."""
    return F.kl_div(target_probs, probs, reduction="batchmean")


def kl_with_log_target(log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """kl_div that takes y for log y: sum e^y (y - log p) / N."""
    return F.kl_div(log_probs, target_probs, reduction="batchmean", log_target=True)


def model_to_target_kl(log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Mean of D_KL(p; y) = sum_c p_c (log p_c - log y_c): the model first; y floored at 1e-6."""
    return (log_probs.exp() * (log_probs - target_probs.clamp_min(1e-6).log())).sum(-1).mean()


def target_to_model_kl(log_probs: Tensor, target_probs: Tensor) -> Tensor:
    """Mean of D_KL(y; p) = sum_c y_c (log y_c - log p_c): the target first, 0 log 0 = 0."""
    return (torch.xlogy(target_probs, target_probs) - target_probs * log_probs).sum(-1).mean()


# Softmax and the logarithm


def softmax_twice(probs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy that gets p instead of z, and takes softmax(p)."""
    return F.cross_entropy(probs, labels)


def log_softmax_twice(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy that gets log p instead of z; log_softmax of log p is log p."""
    return F.cross_entropy(log_probs, labels)


def log_of_softmax(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log(p)_y, with the logarithm of every rounded probability."""
    return F.nll_loss(probs.log(), labels)


def log_of_chosen_probability(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log(p_y), with the logarithm of the label's rounded probability only."""
    return -_chosen(probs, labels).log().mean()


def clipped(probs: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Mean of -log(clip(p_y, e, 1 - e))."""
    return -_chosen(probs, labels).clamp(epsilon, 1 - epsilon).log().mean()


def clipped_at_machine_epsilon(probs: Tensor, labels: Tensor) -> Tensor:
    """`clipped` at the distance from 1 to the next number of the input's own precision."""
    return clipped(probs, labels, torch.finfo(probs.dtype).eps)


def epsilon_added(probs: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Mean of -log(p_y + e)."""
    return -(_chosen(probs, labels) + epsilon).log().mean()


def unshifted_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of log(sum_c exp z_c) - z_y, without a shift before exp."""
    return (logits.exp().sum(1).log() - _chosen(logits, labels)).mean()


def shifted_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of logsumexp(z) - z_y."""
    return (logits.logsumexp(1) - _chosen(logits, labels)).mean()


def _chosen(rows: Tensor, labels: Tensor) -> Tensor:
    """Return the label's entry of each row, [N]."""
    return rows.gather(1, labels[:, None])[:, 0]


# One binary decision for every class


def bce_of_sigmoid(logits: Tensor, target_probs: Tensor) -> Tensor:
    """Mean over N C of -y log s - (1 - y) log(1 - s), of the rounded s = sigmoid(z)."""
    return F.binary_cross_entropy(logits.sigmoid(), target_probs)


def bce_over_classes(logits: Tensor, target_probs: Tensor) -> Tensor:
    """sum_c of C binary cross-entropies of z_c, over N."""
    return F.binary_cross_entropy_with_logits(logits, target_probs, reduction="sum") / len(logits)


def bce_of_the_difference(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of z_1 - z_0, logits [N, 2]."""
    return F.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], labels.to(logits.dtype))


# Class weights and label smoothing


def class_weights(logits: Tensor) -> Tensor:
    """From 0.5 for the first class to 2 for the last, [C]."""
    return torch.linspace(0.5, 2, logits.shape[-1], dtype=logits.dtype, device=logits.device)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    """sum w_y l / sum w_y: what torch calls the mean."""
    return F.cross_entropy(logits, labels, weight=class_weights(logits))


def weighted_over_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """sum w_y l / N."""
    return F.cross_entropy(logits, labels, weight=class_weights(logits), reduction="none").mean()


def weighted_probabilities(logits: Tensor, target_probs: Tensor) -> Tensor:
    """sum_c w_c y_c (-log p_c) over N: torch's mean where targets are probabilities."""
    return F.cross_entropy(logits, target_probs, weight=class_weights(logits))


def sample_weights(labels: Tensor, like: Tensor) -> Tensor:
    """1 for rows of even classes and 0.5 for the others, [N]."""
    return (1 - 0.5 * (labels % 2)).to(like.dtype)


def sample_weighted_over_batch(logits: Tensor, labels: Tensor) -> Tensor:
    """sum_i v_i l_i / N, v a weight for every row."""
    return (F.cross_entropy(logits, labels, reduction="none") * sample_weights(labels, logits)).mean()


def sample_weighted_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """sum_i v_i l_i / sum_i v_i."""
    weights = sample_weights(labels, logits)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Targets (1 - e) y + e / C, as torch smooths them."""
    return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


def weighted_smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Smoothed targets times w_c, over sum w_y: the uniform part is weighted too."""
    return F.cross_entropy(logits, labels, weight=class_weights(logits), label_smoothing=SMOOTHING)


def weighted_smoothed_labels_only(logits: Tensor, labels: Tensor) -> Tensor:
    """(1 - e) sum w_y l / sum w_y + e mean over N C of -log p: the uniform part is not weighted."""
    uniform = -F.log_softmax(logits, 1).mean()
    return (1 - SMOOTHING) * weighted(logits, labels) + SMOOTHING * uniform


def smoothed_over_others(logits: Tensor, labels: Tensor, epsilon: float = SMOOTHING) -> Tensor:
    """Targets 1 - e for the label and e / (C - 1) for every other class."""
    log_probs, others = F.log_softmax(logits, 1), logits.shape[1] - 1
    targets = torch.full_like(logits, epsilon / others).scatter(1, labels[:, None], 1 - epsilon)
    return -(targets * log_probs).sum(1).mean()


def smoothed_over_others_reparametrised(logits: Tensor, labels: Tensor) -> Tensor:
    """`smoothed_over_others` at e (C - 1) / C, where its targets are those of `smoothed` at e."""
    classes = logits.shape[1]
    return smoothed_over_others(logits, labels, SMOOTHING * (classes - 1) / classes)


def smoothed_with_typo(logits: Tensor, labels: Tensor) -> Tensor:
    """Targets (1 - e) y + 1 / C, which sum to 2 - e."""
    classes = logits.shape[1]
    targets = (1 - SMOOTHING) * F.one_hot(labels, classes).to(logits.dtype) + 1 / classes
    return F.cross_entropy(logits, targets)


# What the sum is divided by


def over_all_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """sum l / N, ignored rows counted in N."""
    return F.cross_entropy(logits, labels, reduction="none").mean()


def over_at_least_one(logits: Tensor, labels: Tensor) -> Tensor:
    """sum l / max(1, valid targets): 0 where all targets are ignored."""
    return F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum().clamp_min(1)


def named_class_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows of the class are left out; its logit stays in every other row's softmax."""
    return F.cross_entropy(logits, labels, ignore_index=NAMED_CLASS)


def named_class_removed(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows of the class are left out, and the class itself."""
    column = torch.tensor([NAMED_CLASS], device=logits.device)
    return F.cross_entropy(logits.index_fill(1, column, -torch.inf), labels, ignore_index=NAMED_CLASS)


def mean_of_means(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Mean over groups of rows of each group's own mean over its valid targets."""
    return torch.stack([over_at_least_one(z, y) for z, y in zip(logits, labels, strict=True)]).mean()


def accumulated(logits: Tensor, labels: Tensor) -> Tensor:
    """Four micro-batches, one after the other, each with its own mean."""
    return mean_of_means(logits.chunk(4), labels.chunk(4))


def mean_of_sequences(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of means with every sequence a micro-batch; logits [B, T, V], labels [B, T]."""
    return mean_of_means(logits.unbind(), labels.unbind())


def data_parallel(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of means over two devices, each with half of the batch."""
    return mean_of_means(logits.chunk(2), labels.chunk(2))


def distributed(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of means over two ranks with alternate rows."""
    ranks = range(min(2, len(labels)))
    return mean_of_means([logits[r::2] for r in ranks], [labels[r::2] for r in ranks])


def partial_window(logits: Tensor, labels: Tensor) -> Tensor:
    """sum of the micro-batches' means over `ACCUMULATION`, for any number of micro-batches."""
    groups = zip(logits.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True)
    return torch.stack([F.cross_entropy(z, y) for z, y in groups]).sum() / ACCUMULATION


def partial_window_of_single_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """The same with micro-batches of one row."""
    return F.cross_entropy(logits, labels, reduction="sum") / ACCUMULATION


def smoothed_over_own_items(logits: Tensor, labels: Tensor) -> Tensor:
    """Label smoothing that divides by the micro-batch's own valid tokens."""
    return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


def smoothed_over_all_items(logits: Tensor, labels: Tensor) -> Tensor:
    """Label smoothing that divides by the valid tokens of the whole accumulation window, `NUM_ITEMS`."""
    return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="sum") / NUM_ITEMS


# Precision


def in_bfloat16(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits rounded to bfloat16, and the loss computed in it."""
    return F.cross_entropy(logits.bfloat16(), labels).to(logits.dtype)


def in_float32(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits converted to float32 from any precision."""
    return F.cross_entropy(logits.float(), labels)


def stepwise(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y by steps, each rounded to the logits' precision, as in eager mode without a fused kernel."""
    shifted = logits - logits.detach().amax(1, keepdim=True)
    return (shifted.exp().sum(1).log() - _chosen(shifted, labels)).mean()


def stepwise_fused(logits: Tensor, labels: Tensor) -> Tensor:
    """`stepwise` as a compiler fuses it: float32 inside, rounded once at the end."""
    return stepwise(logits.float(), labels).to(logits.dtype)


# Gradients written by hand


class _HandWritten(torch.autograd.Function):
    """Mean of l with a hand-written backward pass, right or wrong.

    Args (of apply): logits, labels, and the kind: "right", "zero", "bfloat16", or the pass that writes the gradient
        over the logits, "backward" or "forward".
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, way: str) -> Tensor:
        value = F.nll_loss(F.log_softmax(logits, 1), labels)
        ctx.way, ctx.labels = way, labels
        if way == "forward":
            logits.data.copy_(_gradient(logits, labels))
        ctx.save_for_backward(logits)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        if ctx.way == "forward":
            return upstream[0] * logits, None, None
        gradient = upstream[0] * _gradient(logits, ctx.labels)
        if ctx.way == "zero":
            gradient = torch.zeros_like(gradient)
        if ctx.way == "bfloat16":
            gradient = gradient.bfloat16().to(gradient.dtype)
        if ctx.way == "backward":
            gradient = logits.data.copy_(gradient)
        return gradient, None, None


def _gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """(p - y) / N."""
    probs = F.softmax(logits, 1)
    return (probs - F.one_hot(labels, logits.shape[1]).to(probs.dtype)) / len(labels)


def hand_written(logits: Tensor, labels: Tensor, way: str) -> Tensor:
    """`_HandWritten` as a function."""
    value: Tensor = _HandWritten.apply(logits, labels, way)
    return value


class _FusedLinear(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T, some rows at a time, with gradients computed in forward.

    Args (of apply): hidden [N, D], weight [C, D], labels [N], and the precision in which the weight's gradient is
        added up over the chunks.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, accumulator: torch.dtype) -> Tensor:
        total = hidden.new_zeros(())
        by_hidden, by_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=accumulator)
        for rows in torch.arange(len(labels)).split(CHUNK):
            logits = hidden[rows] @ weight.T
            total += F.cross_entropy(logits, labels[rows], reduction="sum")
            by_logits = _gradient(logits, labels[rows]) * (len(rows) / len(labels))
            by_hidden[rows] = by_logits @ weight
            by_weight += (by_logits.T @ hidden[rows]).to(accumulator)
        ctx.save_for_backward(by_hidden, by_weight.to(weight.dtype))
        return total / len(labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        return upstream[0] * by_hidden, upstream[0] * by_weight, None, None


def fused_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`_FusedLinear` that adds up in the precision of its inputs."""
    value: Tensor = _FusedLinear.apply(hidden, weight, labels, weight.dtype)
    return value


def fused_linear_adding_in_bfloat16(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`_FusedLinear` that adds up in bfloat16."""
    value: Tensor = _FusedLinear.apply(hidden, weight, labels, torch.bfloat16)
    return value


class _ProbsMinusTargets(torch.autograd.Function):
    """Mean of -sum_c y_c log p_c with the gradient (p - y) / N, which is its derivative where y sums to 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_probs: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target_probs)
        return -(target_probs * F.log_softmax(logits, 1)).sum(1).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        logits, target_probs = ctx.saved_tensors
        return upstream[0] * (F.softmax(logits, 1) - target_probs) / len(logits), None


def probs_minus_targets(logits: Tensor, target_probs: Tensor, mass: float = 1.0) -> Tensor:
    """`_ProbsMinusTargets` of targets that sum to `mass`."""
    value: Tensor = _ProbsMinusTargets.apply(logits, mass * target_probs)
    return value


def cross_entropy_of_mass(logits: Tensor, target_probs: Tensor, mass: float) -> Tensor:
    """The same value by autograd, whose gradient is (p sum_c y_c - y) / N."""
    return F.cross_entropy(logits, mass * target_probs)


# Labels that are no class


def nan_for_unknown_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """NaN if a label is no class, without an error."""
    known = (labels >= 0) & (labels < logits.shape[1])
    losses = F.cross_entropy(logits, labels.where(known, torch.zeros_like(labels)), reduction="none")
    return losses.where(known, torch.full_like(losses, torch.nan)).mean()


def nearest_known_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Replace a label that is no class by the nearest class."""
    return F.cross_entropy(logits, labels.clamp(0, logits.shape[1] - 1))


# Focal loss, axes, temperature, penalties


def focal(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Mean of (1 - p_y)^gamma l, 1 - p_y by subtraction."""
    log_p = _chosen(F.log_softmax(logits, 1), labels)
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def focal_of_log_odds(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """The same from d = log((1 - p_y) / p_y) = logsumexp of the other classes - z_y: sigmoid(d)^gamma softplus(d)."""
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    log_odds = others - _chosen(logits, labels)
    return ((gamma * F.logsigmoid(log_odds)).exp() * -F.logsigmoid(-log_odds)).mean()


def softmax_over_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax over the batch axis instead of the class axis."""
    return F.nll_loss(F.log_softmax(logits, 0), labels)


def view_for_transpose(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T, V] reshaped to torch's [B, V, T] instead of transposed, which mixes tokens and classes."""
    return F.cross_entropy(logits.reshape(logits.shape[0], logits.shape[2], logits.shape[1]), labels)


def distillation(logits: Tensor, target_probs: Tensor, factor: float) -> Tensor:
    """factor times the mean of D_KL(y; softmax(z / T)), y the teacher's probabilities at the same T."""
    return factor * F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), target_probs, reduction="batchmean")


def l2_penalised(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy + 1e-2 ||weight||^2 / 2."""
    return F.cross_entropy(F.linear(hidden, weight), labels) + 0.5e-2 * weight.square().sum()
