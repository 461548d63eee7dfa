"""The batches that a loss is asked about: a covering design, never a product, of numbers that float32 holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = (2, 10, 1000, 50_000)
VOCABULARIES = (2, 10, 1000, 128_256)
ROWS = ((1,), (2,), (7,), (64,), (300,))
TOKENS = ((1, 1), (2, 1), (1, 7), (8, 8), (4, 75))
LARGEST = 2**18  # logits in one batch
MANY = 20_000  # classes from which on only some families are asked
WIDTH = 32  # D of fused batches
UPSTREAM = 3.7  # a gradient that reaches the loss from outside, as loss scaling and sums of losses have it

CORE_GAP = 80.0
CORE_OFFSET = 100.0
ORDINARY = (0.1, 1.0)  # -log p_y of rows that every loss should get right
ORDINARY_LOGITS = 20.0  # and the largest |logit| of theirs: float32's sigmoid is 1 from 17 on
GAPS = (5.0, 20.0, 40.0, 60.0, 79.0)
FAMILIES = ("ordinary", "random", "mixed", "wrong", "trained", "confident", "ties", "offset")
WIDE_FAMILIES = ("ordinary", "random", "mixed", "wrong")


@dataclass(frozen=True)
class AuditBatch:
    """Inputs of a loss in float64.

    Attributes:
        family: what kind of rows these are; "mixed" has all kinds.
        logits: [..., C]; of a fused batch, what hidden, weight and bias make of themselves.
        labels: int64 [...].
        target_probs: [..., C]; one-hot unless soft targets were asked for, zero in ignored rows.
        valid: bool [...], false where the label is to be ignored.
        hidden, weight, bias: [..., D], [C, D] and [C] of a fused batch.
        layout: how the logits (or hidden and weight) lie in memory: contiguous, transposed or strided.
        upstream: the gradient that reaches the loss from outside.
    """

    family: str
    logits: Tensor
    labels: Tensor
    target_probs: Tensor
    valid: Tensor
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    layout: str = "contiguous"
    upstream: float = 1.0

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[-1]

    @property
    def num_rows(self) -> int:
        """N, or B x T."""
        return self.labels.numel()

    @property
    def contiguous(self) -> bool:
        """Whether every input is; transposed logits of one row are after all."""
        turned = self.layout == "transposed" and (self.hidden is not None or self.labels.shape[-1] > 1)
        return self.layout != "strided" and not turned

    @property
    def where(self) -> str:
        """The batch in a few words."""
        shape = "x".join(map(str, self.labels.shape))
        ignored = f", {self.num_rows - int(self.valid.sum())} ignored" if not self.valid.all() else ""
        outside = f", upstream {self.upstream:g}" if self.upstream != 1 else ""
        layout = f", {self.layout}" if self.layout != "contiguous" else ""
        return f"{self.family} rows, {shape} x C={self.num_classes}{ignored}{layout}{outside}"

    def at(self, dtype: torch.dtype) -> AuditBatch:
        """The same batch with inputs that `dtype` holds exactly."""
        if dtype in (torch.float32, torch.float64):
            return self
        if self.hidden is None:
            return replace(self, logits=_rounded(self.logits, dtype))
        hidden, weight = _rounded(self.hidden, dtype), _rounded(cast(Tensor, self.weight), dtype)
        bias = None if self.bias is None else _rounded(self.bias, dtype)
        logits = F.linear(hidden, weight, bias)
        return replace(self, logits=logits, hidden=hidden, weight=weight, bias=bias)

    def rows(self, kept: Tensor) -> AuditBatch:
        """The rows of a flat batch that a mask or an index keeps."""
        return replace(
            self,
            logits=self.logits[kept],
            labels=self.labels[kept],
            target_probs=self.target_probs[kept],
            valid=self.valid[kept],
            hidden=None if self.hidden is None else self.hidden[kept],
        )


@dataclass(frozen=True)
class BatchShape:
    """What the batches of an audit have in common.

    Attributes:
        num_classes: the C, or V, to cover.
        tokens: rows come as [B, T] rather than [N].
        fused: logits are made of hidden, weight and, where `bias`, a bias.
        soft: target_probs are distributions, not one-hot.
        ignore_index: the label of rows to ignore, some in every other batch; None for none. No other row bears it.
        ignoring: whether any row is ignored.
    """

    num_classes: tuple[int, ...]
    tokens: bool = False
    fused: bool = False
    bias: bool = False
    soft: bool = False
    ignore_index: int | None = None
    ignoring: bool = True

    @property
    def typical_classes(self) -> int:
        """The first number of classes of at least 10, or the first of all: the C of tests that need only one."""
        return next((c for c in self.num_classes if c >= 10), self.num_classes[0])


def grid(shape: BatchShape) -> list[AuditBatch]:
    """Every pair of (family, size), (family, C) and (size, C) at least once, layouts and upstreams among them."""
    draw = torch.Generator().manual_seed(0)
    sizes = TOKENS if shape.tokens else ROWS
    batches = []
    for (i, family), (j, lead) in itertools.product(enumerate(FAMILIES), enumerate(sizes)):
        classes = shape.num_classes[(i + j) % len(shape.num_classes)]
        if classes >= MANY and family not in WIDE_FAMILIES:
            classes = shape.num_classes[(i + j + 1) % len(shape.num_classes)]
        batch = make_batch(family, _fitting(lead, classes), classes, shape, draw, first=i + j)
        layout = ("contiguous", "transposed", "contiguous", "strided")[(i + 2 * j + j // 2) % 4]
        batches.append(replace(batch, layout=layout, upstream=UPSTREAM if (i + j // 2) % 3 == 1 else 1.0))
    return sorted(batches, key=lambda batch: batch.logits.numel())


def _fitting(lead: tuple[int, ...], classes: int) -> tuple[int, ...]:
    """The size itself, or the largest that keeps a batch within `LARGEST` logits."""
    most = max(1, LARGEST // classes)
    if math.prod(lead) <= most:
        return lead
    return (most,) if len(lead) == 1 else (1, most)


def make_batch(
    family: str, lead: Sequence[int], classes: int, shape: BatchShape, draw: torch.Generator, first: int = 0
) -> AuditBatch:
    """A batch of one family; `first` varies which labels, gaps and ignored rows it begins with."""
    rows = math.prod(lead)
    labels = meant(_labels(rows, classes, draw, first), classes, shape.ignore_index)
    odds = torch.stack([_log_odds(kind, classes, first + i, draw) for i, kind in enumerate(_kinds(family, rows))])
    kinds = list(_kinds(family, rows))
    if shape.fused:
        hidden, weight, bias = _fused(kinds, odds, labels, classes, shape.bias, draw)
        logits = F.linear(hidden, weight, bias)
        fused = {"hidden": hidden.unflatten(0, tuple(lead)), "weight": weight, "bias": bias}
    else:
        logits, fused = _logits(kinds, odds, labels, classes, draw, first), {}
    valid = torch.ones(rows, dtype=torch.bool)
    if shape.ignoring and shape.ignore_index is not None and rows > 1 and first % 2 == 0:
        valid = torch.arange(rows) % 3 != 1
    targets = targets_of(labels, classes, shape.soft, draw) * valid[:, None]
    if shape.ignore_index is not None:
        labels = labels.where(valid, torch.tensor(shape.ignore_index))
    flat = {"logits": logits, "labels": labels, "target_probs": targets, "valid": valid}
    return AuditBatch(family, **{name: t.unflatten(0, tuple(lead)) for name, t in flat.items()}, **fused)


def _kinds(family: str, rows: int) -> Iterator[str]:
    kinds = [kind for kind in FAMILIES if kind != "mixed"] if family == "mixed" else [family]
    return itertools.islice(itertools.cycle(kinds), rows)


def meant(labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """The labels, none of which is ignored by accident: where the index to ignore is a class, the next one instead."""
    return labels if ignore_index is None else labels.where(labels != ignore_index, (labels + 1) % classes)


def _labels(rows: int, classes: int, draw: torch.Generator, first: int) -> Tensor:
    """Some classes more often than others; the last class in every batch, or the first in every other single row."""
    labels = (torch.rand(rows, generator=draw, dtype=torch.float32).square() * classes).long().clamp(max=classes - 1)
    labels[-1] = 0 if rows == 1 and first % 2 else classes - 1
    return labels


def _log_odds(kind: str, classes: int, place: int, draw: torch.Generator) -> Tensor:
    """log(p_y / (1 - p_y)) that a row of this kind is given; NaN where it comes as it comes."""
    if kind in ("ordinary", "offset"):
        surprisal = 0.12 + 0.83 * torch.rand((), generator=draw, dtype=torch.float64)
        return -surprisal - torch.log(-torch.expm1(-surprisal))
    gap = torch.tensor(min(GAPS[place % len(GAPS)], CORE_GAP - 1 - math.log(classes)), dtype=torch.float64)
    return {"wrong": -gap - math.log(classes), "confident": gap}.get(kind, torch.tensor(math.nan, dtype=torch.float64))


def _logits(
    kinds: Sequence[str], odds: Tensor, labels: Tensor, classes: int, draw: torch.Generator, first: int
) -> Tensor:
    rows = len(kinds)
    noise = torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    spread = torch.tensor([{"trained": 10.0, "random": 3.0}.get(kind, 1.0) for kind in kinds], dtype=torch.float64)
    logits = (noise * spread[:, None]).clamp(-30, 30)
    for i, kind in enumerate(kinds):
        if kind == "trained":
            logits[i, labels[i]] += 10.0 * (i % 4 > 0)
        elif kind == "ties":  # all classes, or the label and some others
            logits[i] = 0.0 if (i + first) % 2 else logits[i].round()
            logits[i, labels[i]] = logits[i].max()
    others = logits.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    placed = torch.where(odds.isnan(), logits.gather(1, labels[:, None])[:, 0], others + odds)
    logits = logits.scatter(1, labels[:, None], placed[:, None])
    shift = [(-1) ** i * CORE_OFFSET / (1 + i % 3) * 0.97 if kind == "offset" else 0.0 for i, kind in enumerate(kinds)]
    return _rounded(logits + torch.tensor(shift, dtype=torch.float64)[:, None], torch.float32)


@lru_cache(maxsize=8)
def _weight(classes: int) -> Tensor:
    """Directions on the unit sphere [C, WIDTH], as float32 holds them; one tensor for all batches of that C."""
    draw = torch.Generator().manual_seed(classes)
    return _rounded(F.normalize(torch.randn(classes, WIDTH, generator=draw, dtype=torch.float64)), torch.float32)


def _fused(
    kinds: Sequence[str], odds: Tensor, labels: Tensor, classes: int, bias: bool, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias whose logits are of the kinds asked for: each row lies along its label's weights."""
    weight = _weight(classes)
    noise = torch.randn(len(kinds), WIDTH, generator=draw, dtype=torch.float64)
    noise[[kind == "ties" for kind in kinds]] = 0.0
    shift = _rounded(0.1 * torch.randn(classes, generator=draw, dtype=torch.float64), torch.float32) if bias else None
    along = weight[labels]
    others = torch.ones(len(kinds), classes, dtype=torch.bool).scatter(1, labels[:, None], False)
    low, high = torch.full_like(odds, -400.0), torch.full_like(odds, 400.0)
    base, slope = F.linear(noise, weight, shift), along @ weight.T
    for _ in range(30):  # the log-odds of the label grow with the length along its weights
        middle = (low + high) / 2
        logits = base + middle[:, None] * slope
        reached = logits.gather(1, labels[:, None])[:, 0] - logits.where(others, -math.inf).logsumexp(1)
        low, high = torch.where(reached < odds, middle, low), torch.where(reached < odds, high, middle)
    length = torch.where(odds.isnan(), torch.zeros_like(odds), (low + high) / 2)
    hidden = _rounded(noise + length[:, None] * along, torch.float32)
    return hidden, weight, shift


def targets_of(labels: Tensor, classes: int, soft: bool, draw: torch.Generator) -> Tensor:
    """One-hot, or half the mass on the label and the rest drawn in 64ths, which every precision holds exactly."""
    one_hot = F.one_hot(labels, classes).double()
    if not soft:
        return one_hot
    drawn = torch.randint(classes, (len(labels), 32), generator=draw)
    counts = torch.zeros_like(one_hot).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return (one_hot * 32 + counts) / 64


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).double()
