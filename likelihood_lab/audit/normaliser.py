"""Find the divisor of a loss (its reduction) from the weights of rows in batches and alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab.audit.evaluate import Loss, differentiable, evaluate
from likelihood_lab.categorical.batches import AuditBatch, BatchShape, make_batch

CLASSES = 5
SHAPES = ((12,), (7,), (8,), (1,), (5,))
TOKEN_SHAPES = ((3, 4), (2, 6), (5, 2), (1, 6), (4, 1))
SINGLE, LOW = 1e-4, 5e-2  # tolerances for losses that may round to float32, or to less, inside
GROUPED = 2e-3  # tolerance for weights that are grouped by four digits
WORDS = (
    "a constant",
    "valid targets",
    "rows",
    "B*T",
    "B",
    "T",
    "sum of class weights",
    "means of groups",
    "a different weight for every row",
)


@dataclass(frozen=True)
class Normaliser:
    """Divisor of a loss, also called its reduction or normaliser.

    Attributes
    ----------
    divides_by: one of `WORDS`, "not a sum over rows", or another divisor in words.
    accumulation: relative distance between the combined gradients of two micro-batches and the gradient of the
        whole batch: {"sum": d, "mean": d, "mean of unequal": d}. Means over data-parallel ranks are the same.
    cosine: cosine between the mean over micro-batches of unequal valid counts and the whole batch's gradient.
    """

    divides_by: str
    accumulation: Mapping[str, float] = field(default_factory=dict)
    cosine: float | None = None

    @property
    def survives(self) -> str:
        """The ways of combining micro-batches that give the whole batch's gradient, in words."""
        kept = [way for way, distance in self.accumulation.items() if distance < SINGLE]
        names = {"sum": "a sum", "mean": "a mean of equal micro-batches", "mean of unequal": "a mean of unequal ones"}
        return ", ".join(names[way] for way in kept) or "none"


@dataclass(frozen=True)
class _Weights:
    """Weights alpha_i = <g_i, a_i> / <a_i, a_i> of the valid rows.

    Attributes
    ----------
    alpha: g_i is the row's gradient in the batch, a_i its gradient as a batch of one row.
    rest: the largest part of a g_i that is not parallel to a_i, relative to the parallel part.
    """

    batch: AuditBatch
    alpha: Tensor
    labels: list[int]
    rest: float


def normaliser(
    loss: Loss, shape: BatchShape, device: torch.device, dtype: torch.dtype, computes_in: torch.dtype | None
) -> Normaliser:
    """Find the divisor of a loss.

    The gradient of a row alone is compared with its gradient in batches of several sizes, mixes of classes and numbers
    of ignored rows. A sum over rows divided by D gives alpha_i = D(row) / D(batch).

    Args:
        computes_in: a coarser precision than `dtype` in which the loss is known to compute.
    """
    tolerance = LOW if (computes_in or dtype) in (torch.bfloat16, torch.float16) else SINGLE
    generator = torch.Generator().manual_seed(5)
    classes = CLASSES if min(shape.num_classes) <= CLASSES <= max(shape.num_classes) else shape.num_classes[0]
    measured = []
    for place, lead in enumerate(TOKEN_SHAPES if shape.tokens else SHAPES):
        batch = _batch(lead, classes, shape, generator, place).at(dtype)
        weights = _weights(loss, batch, dtype, device)
        if isinstance(weights, str):
            return Normaliser(weights)
        if len(weights.alpha):
            measured.append(weights)
    if not measured:
        return Normaliser("not measured: passes no gradient")
    accumulation = _accumulation(loss, classes, shape, dtype, device)
    return Normaliser(_divisor(measured, tolerance), *accumulation)


def _batch(lead: Sequence[int], classes: int, shape: BatchShape, generator: torch.Generator, place: int) -> AuditBatch:
    """Return a random batch. If rows can be ignored, the ignored ones are spread unevenly."""
    batch = make_batch("random", lead, classes, shape, generator, first=1)
    if shape.ignore_index is None or batch.num_rows == 1:
        return batch
    ignored = torch.arange(batch.num_rows) % 5 == 2
    ignored[: place % 3] = True
    return ignoring(batch, ignored.view(batch.labels.shape), shape.ignore_index)


def ignoring(batch: AuditBatch, ignored: Tensor, ignore_index: int) -> AuditBatch:
    """Return the batch with some of its rows ignored."""
    labels = batch.labels.masked_fill(ignored, ignore_index)
    targets = batch.target_probs.masked_fill(ignored[..., None], 0.0)
    return replace(batch, labels=labels, target_probs=targets, valid=batch.valid & ~ignored)


def _weights(loss: Loss, batch: AuditBatch, dtype: torch.dtype, device: torch.device) -> _Weights | str:
    whole = evaluate(loss, batch, dtype, device)
    if whole.error is not None:
        return f"not measured: {whole.error}"
    name = differentiable(batch)[0]
    together = whole.exact(name).flatten(0, -2)
    alphas, labels, rests = [], [], [0.0]
    for i in torch.nonzero(batch.valid.flatten())[:, 0].tolist():
        single = evaluate(loss, single_row(batch, i), dtype, device)
        if single.error is not None:
            return f"not measured: refuses a batch of one row ({single.error})"
        alone = single.exact(name).flatten(0, -2)[0]
        alpha = (together[i] @ alone) / (alone @ alone)
        if not alone.any() and not together[i].any():  # a row without a gradient has no weight
            continue
        alphas.append(alpha)
        labels.append(int(batch.labels.flatten()[i]))
        rests.append(((together[i] - alpha * alone).norm() / (alpha * alone).norm()).item())
    return _Weights(
        batch, torch.stack(alphas) if alphas else torch.empty(0), labels, max(r if r == r else torch.inf for r in rests)
    )


def single_row(batch: AuditBatch, i: int) -> AuditBatch:
    """Return row i as a batch with the same number of dimensions."""
    lead = (1,) * batch.labels.ndim
    taken = {name: getattr(batch, name).flatten(0, -2)[i].view(*lead, -1) for name in ("logits", "target_probs")}
    hidden = None if batch.hidden is None else batch.hidden.flatten(0, -2)[i].view(*lead, -1)
    labels, valid = (t.flatten()[i].view(lead) for t in (batch.labels, batch.valid))
    return replace(batch, labels=labels, valid=valid, hidden=hidden, **taken)


# --- naming


def _divisor(measured: Sequence[_Weights], tolerance: float) -> str:
    if any(not weights.alpha.isfinite().all() or weights.rest > tolerance for weights in measured):
        return "not a sum over rows"

    def near(value: float, other: float) -> bool:
        return abs(value - other) <= tolerance * max(1.0, abs(other))

    if all(near(a, weights.alpha[0].item()) for weights in measured for a in weights.alpha.tolist()):
        divisors = [1 / weights.alpha[0].item() for weights in measured]
        return _counted(divisors, [weights.batch for weights in measured], near)
    if _by_class(measured, near):
        return "sum of class weights"
    return "means of groups" if _in_groups(measured) else "a different weight for every row"


Near = Callable[[float, float], bool]


def _counted(divisors: Sequence[float], batches: Sequence[AuditBatch], near: Near) -> str:
    """Return the count that equals all divisors; the simplest if several do."""
    counts: dict[str, Callable[[AuditBatch], int]] = {
        "a constant": lambda _: 1,
        "B*T" if batches[0].labels.ndim > 1 else "rows": lambda batch: batch.num_rows,
        "valid targets": lambda batch: int(batch.valid.sum()),
        "B": lambda batch: batch.labels.shape[0],
        "T": lambda batch: batch.labels.shape[-1],
    }
    for word, count in counts.items():
        if all(near(divisor / count(batch), 1.0) for divisor, batch in zip(divisors, batches, strict=True)):
            return word
    shown = ", ".join(f"{d:.6g} for {batch.num_rows} rows" for d, batch in zip(divisors[:2], batches[:2], strict=True))
    return f"another count ({shown})"


def _by_class(measured: Sequence[_Weights], near: Near) -> bool:
    """Return whether alpha_i = w_y / sum_j w_y_j: weights sum to 1, with one ratio of two classes in all batches."""
    relative: dict[int, float] = {}
    for weights in measured:
        alpha, labels = weights.alpha.tolist(), weights.labels
        if not near(sum(alpha), 1.0):
            return False
        shared = next((i for i, label in enumerate(labels) if label in relative), None)
        size = alpha[shared] / relative[labels[shared]] if shared is not None else alpha[0]
        for a, label in zip(alpha, labels, strict=True):
            if not near(a / size / relative.setdefault(label, a / size), 1.0):
                return False
    return True


def _in_groups(measured: Sequence[_Weights]) -> bool:
    """Return whether rows of a group have equal weights, and each group's total is an integer multiple of one share."""
    for weights in measured:
        counts = Counter(float(f"{a:.4g}") for a in weights.alpha.tolist())
        totals = [alpha * count for alpha, count in counts.items()]
        share = min(totals)
        if share <= 0 or any(abs(total / share - round(total / share)) > GROUPED for total in totals):
            return False
    return True


# --- micro-batches


def _accumulation(
    loss: Loss, classes: int, shape: BatchShape, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, float], float | None]:
    """Return `Normaliser.accumulation` and `Normaliser.cosine`, measured on two micro-batches."""
    generator = torch.Generator().manual_seed(6)
    lead = (4, 3) if shape.tokens else (12,)
    batch = make_batch("random", lead, classes, replace(shape, ignoring=False), generator)
    half = batch.labels.shape[0] // 2
    cut = half // 2 if shape.ignore_index is None else half
    uneven = batch
    if shape.ignore_index is not None:  # most of the first half is ignored
        ignored = torch.zeros(batch.num_rows, dtype=torch.bool)
        ignored[: batch.num_rows // 2 - 1] = True
        uneven = ignoring(batch, ignored.view(batch.labels.shape), shape.ignore_index)
    name = differentiable(batch)[0]

    def gradient(part: AuditBatch) -> Tensor | None:
        result = evaluate(loss, part.at(dtype), dtype, device)
        return None if result.error is not None else result.exact(name)

    distances: dict[str, float] = {}
    cosine = None
    for way, whole, split in (("mean", batch, half), ("mean of unequal", uneven, cut)):
        kept = torch.arange(whole.labels.shape[0]) < split
        parts = [gradient(whole), gradient(whole.rows(kept)), gradient(whole.rows(~kept))]
        if any(part is None for part in parts):
            return {}, None
        full, joined = parts[0], torch.cat([part for part in parts[1:] if part is not None])
        if full is None:
            return {}, None
        if way == "mean of unequal":
            distances["sum"] = max(distances["sum"], _distance(joined, full))
            cosine = F.cosine_similarity(joined.flatten(), full.flatten(), dim=0).item()
        else:
            distances["sum"] = _distance(joined, full)
        distances[way] = _distance(joined / 2, full)
    return distances, cosine


def _distance(a: Tensor, b: Tensor) -> float:
    distance = ((a - b).norm() / b.norm()).item()
    return distance if distance == distance else torch.inf
