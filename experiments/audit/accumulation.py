"""Measure gradient accumulation with uneven micro-batches, before and after transformers#34191.

    python -m experiments.audit.accumulation

Before the fix each micro-batch was divided by its own number of valid tokens, and the means were averaged. After it,
sums are divided by the number of valid tokens of all micro-batches, `num_items_in_batch`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.audit.tables import environment, markdown
from likelihood_lab.audit.api import check
from likelihood_lab.audit.finding import Finding

IGNORED = -100
HIDDEN, VOCABULARY, LENGTH, PER_BATCH = 16, 50, 32, 2
EQUAL = (24,) * 8  # valid tokens of the sequences
MILD = (32, 30, 26, 22, 18, 16, 14, 12)
UNEVEN = (32, 32, 3, 2, 20, 12, 4, 1)
SPLITS = {"equal": EQUAL, "mild": MILD, "uneven": UNEVEN}
NUM_ITEMS = 64  # valid tokens of the whole accumulation window

Accumulated = Callable[[Tensor, Tensor], Tensor]


def micro_batches(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of sequences, flattened to rows."""
    for z, y in zip(logits.split(PER_BATCH), labels.split(PER_BATCH), strict=True):
        yield z.flatten(0, 1), y.flatten()


def before(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the micro-batches' means; a micro-batch without a valid token counts 0."""
    means = [F.cross_entropy(z, y, reduction="sum") / _valid(y).clamp_min(1) for z, y in micro_batches(logits, labels)]
    return torch.stack(means).mean()


def after(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the micro-batches' sums, divided by the number of valid tokens of all."""
    num_items = _valid(labels).clamp_min(1)
    return torch.stack(
        [F.cross_entropy(z, y, reduction="sum") / num_items for z, y in micro_batches(logits, labels)]
    ).sum()


def whole(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the valid tokens of the whole batch."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def micro_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of one micro-batch before the fix."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def micro_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of one micro-batch after the fix: its sum divided by `NUM_ITEMS`."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / NUM_ITEMS


def _valid(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def weight_gradient(objective: Accumulated, valid: Sequence[int]) -> Tensor:
    """Return the gradient of a linear head over random hidden states, sequences padded to `LENGTH`, float64."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(valid), LENGTH, HIDDEN, generator=draw, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw, dtype=torch.float64).requires_grad_()
    labels = torch.randint(VOCABULARY, (len(valid), LENGTH), generator=draw)
    padded = torch.arange(LENGTH) >= torch.tensor(valid)[:, None]
    value = objective(F.linear(hidden, weight), labels.masked_fill(padded, IGNORED))
    return torch.autograd.grad(value, weight)[0]


def error_table() -> str:
    """Return the relative distance and the cosine to the whole batch's gradient."""
    rows = []
    for split, valid in SPLITS.items():
        right = weight_gradient(whole, valid)
        for name, objective in (("before: mean of means", before), ("after: sum over num_items", after)):
            found = weight_gradient(objective, valid)
            distance = ((found - right).norm() / right.norm()).item()
            cosine = F.cosine_similarity(found.flatten(), right.flatten(), dim=0).item()
            rows.append(
                [split, name, f"{distance:.2g}", f"{cosine:.4f}", f"{(found.norm() / right.norm()).item():.3f}"]
            )
    columns = ["split", "accumulated", "relative distance", "cosine", "ratio of norms"]
    return markdown(columns, rows)


def audit_tables() -> str:
    """Audit the accumulated objectives and the loss of a single micro-batch."""
    asked: dict[str, tuple[Accumulated, dict[str, Any]]] = {
        "before, accumulated": (before, {"tokens": True}),
        "after, accumulated": (after, {"tokens": True}),
        "before, one micro-batch: mean": (micro_mean, {}),
        f"after, one micro-batch: sum over {NUM_ITEMS}": (micro_sum, {}),
    }
    rows = []
    for name, (objective, more) in asked.items():
        finding = check(objective, ignore_index=IGNORED, **more)
        rows.append([name, finding.objective, *_normaliser(finding)])
    columns = ["loss", "objective", "divides by", "sum", "mean", "mean of unequal", "cosine", "survives in"]
    return markdown(columns, rows)


def _normaliser(finding: Finding) -> list[object]:
    found = finding.normaliser
    if found is None:
        return [None] * 6
    distances = [f"{found.accumulation[way]:.2g}" for way in ("sum", "mean", "mean of unequal") if found.accumulation]
    cosine = None if found.cosine is None else f"{found.cosine:.4f}"
    return [found.divides_by, *distances, cosine, found.survives]


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    counts = "; ".join(f"{name} {', '.join(map(str, valid))}" for name, valid in SPLITS.items())
    print(
        f"# transformers#34191: accumulation before and after\n\n{environment()}, float64.\n\n"
        f"{len(EQUAL)} sequences padded to {LENGTH} tokens, {PER_BATCH} a micro-batch; a linear head of {HIDDEN} x "
        f"{VOCABULARY}, the gradient of its weights against that of the whole batch. Valid tokens: {counts}.\n\n"
        f"{error_table()}\n\nWhat the audit says; the distances are those of two micro-batches to the whole batch, "
        f"by how they are put together:\n\n{audit_tables()}"
    )


if __name__ == "__main__":
    main()
