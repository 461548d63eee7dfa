"""Batches of the audit: a covering design of families, sizes and class counts. float32 holds all inputs exactly."""

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
LARGEST = 2**18  # most logits in one batch
MANY = 20_000  # from this number of classes, only WIDE_FAMILIES are used, to save time
WIDTH = 32  # D of fused batches
UPSTREAM = 3.7  # upstream gradient of the loss, as under loss scaling and in sums of losses

CORE_GAP = 80.0
CORE_OFFSET = 100.0
ORDINARY = (0.1, 1.0)  # surprisal -log p_y, in nats, of rows that every loss should compute correctly
ORDINARY_LOGITS = 20.0  # largest |logit| of these rows; the sigmoid in float32 is 1 from 17
GAPS = (5.0, 20.0, 40.0, 60.0, 79.0)
FAMILIES = ("ordinary", "random", "mixed", "wrong", "trained", "confident", "ties", "offset")
WIDE_FAMILIES = ("ordinary", "random", "mixed", "wrong")


@dataclass(frozen=True)
class AuditBatch:
    """Inputs of a loss in float64.

    Attributes
    ----------
    family : str
        Kind of the rows, one of FAMILIES; "mixed" has all kinds.
    logits : Tensor [..., C]
        Logits; in a fused batch, those of hidden, weight and bias.
    labels : Tensor [...]
        Labels, int64.
    target_probs : Tensor [..., C]
        Target probabilities: one-hot, or soft. They are zero in ignored rows.
    valid : Tensor [...]
        False for a row that the loss must ignore, bool.
    hidden, weight, bias : Tensor [..., D], [C, D], [C], or None
        Inputs of a fused batch.
    layout : {"contiguous", "transposed", "strided"}
        Memory layout of the logits, or of hidden and weight.
    upstream : float
        Upstream gradient of the loss.
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
        """Number of classes C."""
        return self.logits.shape[-1]

    @property
    def num_rows(self) -> int:
        """Number of rows: N, or B x T for tokens."""
        return self.labels.numel()

    @property
    def contiguous(self) -> bool:
        """True if every input is contiguous. Transposed logits of one row are."""
        turned = self.layout == "transposed" and (self.hidden is not None or self.labels.shape[-1] > 1)
        return self.layout != "strided" and not turned

    @property
    def where(self) -> str:
        """Short description of the batch, for messages."""
        shape = "x".join(map(str, self.labels.shape))
        ignored = f", {self.num_rows - int(self.valid.sum())} ignored" if not self.valid.all() else ""
        outside = f", upstream {self.upstream:g}" if self.upstream != 1 else ""
        layout = f", {self.layout}" if self.layout != "contiguous" else ""
        return f"{self.family} rows, {shape} x C={self.num_classes}{ignored}{layout}{outside}"

    def at(self, dtype: torch.dtype) -> AuditBatch:
        """Round the inputs to values that `dtype` holds exactly."""
        if dtype in (torch.float32, torch.float64):
            return self
        if self.hidden is None:
            return replace(self, logits=_rounded(self.logits, dtype))
        hidden, weight = _rounded(self.hidden, dtype), _rounded(cast(Tensor, self.weight), dtype)
        bias = None if self.bias is None else _rounded(self.bias, dtype)
        logits = F.linear(hidden, weight, bias)
        return replace(self, logits=logits, hidden=hidden, weight=weight, bias=bias)

    def rows(self, kept: Tensor) -> AuditBatch:
        """Select rows of a flat batch by a mask or an index."""
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
    """Properties that the batches of an audit share.

    Attributes
    ----------
    num_classes : tuple of int
        Numbers of classes, or sizes of vocabularies, to cover.
    tokens : bool
        Rows have the shape [B, T] instead of [N].
    fused : bool
        Logits are computed from hidden and weight.
    bias : bool
        A fused batch has a bias.
    soft : bool
        `target_probs` are distributions instead of one-hot.
    ignore_index : int or None
        Label of ignored rows. No other row has it.
    ignoring : bool
        Every other batch has ignored rows, if there is an `ignore_index`.
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
    """Build batches that cover every pair of (family, size), (family, C) and (size, C), in all layouts.

    Parameters
    ----------
    shape : BatchShape
        Properties that the batches share.

    Returns
    -------
    list of AuditBatch
        The batches, smallest first. They are the same in every call.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = TOKENS if shape.tokens else ROWS
    batches = []
    for (i, family), (j, lead) in itertools.product(enumerate(FAMILIES), enumerate(sizes)):
        classes = shape.num_classes[(i + j) % len(shape.num_classes)]
        if classes >= MANY and family not in WIDE_FAMILIES:
            classes = shape.num_classes[(i + j + 1) % len(shape.num_classes)]
        batch = make_batch(family, _fit_size(lead, classes), classes, shape, generator, first=i + j)
        layout = ("contiguous", "transposed", "contiguous", "strided")[(i + 2 * j + j // 2) % 4]
        batches.append(replace(batch, layout=layout, upstream=UPSTREAM if (i + j // 2) % 3 == 1 else 1.0))
    return sorted(batches, key=lambda batch: batch.logits.numel())


def _fit_size(lead: tuple[int, ...], classes: int) -> tuple[int, ...]:
    """Reduce a size so that the batch has at most `LARGEST` logits."""
    most = max(1, LARGEST // classes)
    if math.prod(lead) <= most:
        return lead
    return (most,) if len(lead) == 1 else (1, most)


def make_batch(
    family: str, lead: Sequence[int], classes: int, shape: BatchShape, generator: torch.Generator, first: int = 0
) -> AuditBatch:
    """Build a batch of one family.

    Parameters
    ----------
    family : str
        One of FAMILIES.
    lead : sequence of int
        Shape of the rows: (N,) or (B, T).
    classes : int
        Number of classes C.
    shape : BatchShape
        Properties of the batch; its `num_classes` is not used.
    generator : torch.Generator
        Source of all random numbers.
    first : int
        Offset that varies the labels, gaps and ignored rows.

    Returns
    -------
    AuditBatch
    """
    rows = math.prod(lead)
    labels = avoid_ignore_index(_labels(rows, classes, generator, first), classes, shape.ignore_index)
    odds = torch.stack([_log_odds(kind, classes, first + i, generator) for i, kind in enumerate(_kinds(family, rows))])
    kinds = list(_kinds(family, rows))
    if shape.fused:
        hidden, weight, bias = _fused(kinds, odds, labels, classes, shape.bias, generator)
        logits = F.linear(hidden, weight, bias)
        fused = {"hidden": hidden.unflatten(0, tuple(lead)), "weight": weight, "bias": bias}
    else:
        logits, fused = _logits(kinds, odds, labels, classes, generator, first), {}
    valid = torch.ones(rows, dtype=torch.bool)
    if shape.ignoring and shape.ignore_index is not None and rows > 1 and first % 2 == 0:
        valid = torch.arange(rows) % 3 != 1
    targets = targets_of(labels, classes, shape.soft, generator) * valid[:, None]
    if shape.ignore_index is not None:
        labels = labels.where(valid, torch.tensor(shape.ignore_index))
    flat = {"logits": logits, "labels": labels, "target_probs": targets, "valid": valid}
    return AuditBatch(family, **{name: t.unflatten(0, tuple(lead)) for name, t in flat.items()}, **fused)


def _kinds(family: str, rows: int) -> Iterator[str]:
    kinds = [kind for kind in FAMILIES if kind != "mixed"] if family == "mixed" else [family]
    return itertools.islice(itertools.cycle(kinds), rows)


def avoid_ignore_index(labels: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Replace labels that equal the index to ignore by the next class, so that no row is ignored by accident."""
    return labels if ignore_index is None else labels.where(labels != ignore_index, (labels + 1) % classes)


def _labels(rows: int, classes: int, generator: torch.Generator, first: int) -> Tensor:
    """Random labels, unevenly spread. Each batch has the last class; every other batch of one row has class 0."""
    labels = (
        (torch.rand(rows, generator=generator, dtype=torch.float32).square() * classes).long().clamp(max=classes - 1)
    )
    labels[-1] = 0 if rows == 1 and first % 2 else classes - 1
    return labels


def _log_odds(kind: str, classes: int, place: int, generator: torch.Generator) -> Tensor:
    """Log-odds log(p_y / (1 - p_y)) of a row of this kind; NaN for kinds that do not prescribe them."""
    if kind in ("ordinary", "offset"):
        surprisal = 0.12 + 0.83 * torch.rand((), generator=generator, dtype=torch.float64)
        return -surprisal - torch.log(-torch.expm1(-surprisal))
    gap = torch.tensor(min(GAPS[place % len(GAPS)], CORE_GAP - 1 - math.log(classes)), dtype=torch.float64)
    return {"wrong": -gap - math.log(classes), "confident": gap}.get(kind, torch.tensor(math.nan, dtype=torch.float64))


def _logits(
    kinds: Sequence[str], odds: Tensor, labels: Tensor, classes: int, generator: torch.Generator, first: int
) -> Tensor:
    rows = len(kinds)
    noise = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
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
    """Return unit vectors [C, WIDTH], rounded to float32; one cached tensor for all batches of that C."""
    generator = torch.Generator().manual_seed(classes)
    return _rounded(F.normalize(torch.randn(classes, WIDTH, generator=generator, dtype=torch.float64)), torch.float32)


def _fused(
    kinds: Sequence[str], odds: Tensor, labels: Tensor, classes: int, bias: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden, weight and bias with logits of the given kinds. Each hidden row points along its label's weights."""
    weight = _weight(classes)
    noise = torch.randn(len(kinds), WIDTH, generator=generator, dtype=torch.float64)
    noise[[kind == "ties" for kind in kinds]] = 0.0
    shift = (
        _rounded(0.1 * torch.randn(classes, generator=generator, dtype=torch.float64), torch.float32) if bias else None
    )
    along = weight[labels]
    others = torch.ones(len(kinds), classes, dtype=torch.bool).scatter(1, labels[:, None], False)
    low, high = torch.full_like(odds, -400.0), torch.full_like(odds, 400.0)
    base, slope = F.linear(noise, weight, shift), along @ weight.T
    for _ in range(30):  # bisection: the log-odds of the label grow with the length along its weights
        middle = (low + high) / 2
        logits = base + middle[:, None] * slope
        reached = logits.gather(1, labels[:, None])[:, 0] - logits.where(others, -math.inf).logsumexp(1)
        low, high = torch.where(reached < odds, middle, low), torch.where(reached < odds, high, middle)
    length = torch.where(odds.isnan(), torch.zeros_like(odds), (low + high) / 2)
    hidden = _rounded(noise + length[:, None] * along, torch.float32)
    return hidden, weight, shift


def targets_of(labels: Tensor, classes: int, soft: bool, generator: torch.Generator) -> Tensor:
    """Build one-hot or soft targets.

    Soft targets have half of the mass on the label and the rest on random classes, in steps of 1/64. Every precision
    holds these numbers exactly.

    Parameters
    ----------
    labels : Tensor [N]
        Labels, int64.
    classes : int
        Number of classes C.
    soft : bool
        True for soft targets.
    generator : torch.Generator
        Source of the random classes; not used for one-hot targets.

    Returns
    -------
    Tensor [N, C]
        Probabilities in float64.
    """
    one_hot = F.one_hot(labels, classes).double()
    if not soft:
        return one_hot
    others = torch.randint(classes, (len(labels), 32), generator=generator)
    counts = torch.zeros_like(one_hot).scatter_add_(1, others, torch.ones_like(others, dtype=torch.float64))
    return (one_hot * 32 + counts) / 64


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).double()
