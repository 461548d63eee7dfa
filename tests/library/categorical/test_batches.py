from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from likelihood_lab.categorical.batches import (
    CLASSES,
    CORE_GAP,
    FAMILIES,
    LARGEST,
    MANY,
    ROWS,
    TOKENS,
    UPSTREAM,
    WIDE_FAMILIES,
    AuditBatch,
    BatchShape,
    make_batch,
    targets_of,
)
from likelihood_lab.categorical.batches import grid as build_grid

NARROW = (2, 10, 1000)
SHAPES = {
    "default": BatchShape(CLASSES),
    "narrow": BatchShape(NARROW),
    "two classes": BatchShape((2,)),
    "soft": BatchShape(NARROW, soft=True),
    "ignoring": BatchShape(NARROW, ignore_index=-100),
    "tokens": BatchShape(NARROW, tokens=True, ignore_index=-100),
    "fused": BatchShape(NARROW, fused=True, bias=True),
    "fused tokens": BatchShape((2, 10), tokens=True, fused=True, soft=True, ignore_index=-1),
}
grid = cache(build_grid)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def surprisal(batch: AuditBatch) -> Tensor:
    """Surprisal -log p_y = softplus(logsumexp of the others - z_y) of the valid rows, exact for small values."""
    logits, labels = batch.logits[batch.valid], batch.labels[batch.valid][:, None]
    others = logits.scatter(1, labels, -math.inf).logsumexp(1)
    return F.softplus(others - logits.gather(1, labels)[:, 0], threshold=1e3)


@every_shape
def test_grid_covers_every_pair_of_family_size_and_classes(shape: BatchShape) -> None:
    batches = grid(shape)
    sizes = TOKENS if shape.tokens else ROWS
    fitting = {
        (size, c): size if math.prod(size) * c <= LARGEST else (*((1,) * (len(size) - 1)), LARGEST // c)
        for size, c in itertools.product(sizes, shape.num_classes)
    }
    shapes = {(batch.family, tuple(batch.labels.shape), batch.num_classes) for batch in batches}
    for family, size in itertools.product(FAMILIES, sizes):
        assert any((family, fitting[size, c], c) in shapes for c in shape.num_classes), (family, size)
    for family, c in itertools.product(FAMILIES, shape.num_classes):
        if c < MANY or family in WIDE_FAMILIES:
            assert any(found[0] == family and found[2] == c for found in shapes), (family, c)
    for size, c in itertools.product(sizes, shape.num_classes):
        assert any(found[1:] == (fitting[size, c], c) for found in shapes), (size, c)


@every_shape
def test_grid_has_every_layout_and_upstream_for_each_family(shape: BatchShape) -> None:
    batches = grid(shape)
    for family in FAMILIES:
        mine = [batch for batch in batches if batch.family == family]
        assert {batch.layout for batch in mine} == {"contiguous", "transposed", "strided"}
        assert {batch.upstream for batch in mine} == {1.0, UPSTREAM}


@pytest.mark.parametrize("name", ["default", "soft", "ignoring", "tokens", "fused", "fused tokens"])
def test_grid_inputs_fit_float32_and_the_size_limit(name: str) -> None:
    for batch in grid(SHAPES[name]):
        assert batch.logits.numel() <= LARGEST
        for tensor in [batch.logits] if batch.hidden is None else [batch.hidden, batch.weight, batch.bias]:
            if tensor is not None:
                assert torch.equal(tensor, tensor.float().double()), batch.where
        assert torch.equal(batch.target_probs, batch.target_probs.bfloat16().double())


def test_grid_is_sorted_and_reaches_300_rows() -> None:
    batches = grid(BatchShape(CLASSES))
    assert max(batch.num_rows for batch in batches) == 300
    assert {1, 2, 7, 64} <= {batch.num_rows for batch in batches}
    sizes = [batch.logits.numel() for batch in batches]
    assert sizes == sorted(sizes)


@every_shape
def test_grid_has_the_last_class_in_every_batch_of_rows(shape: BatchShape) -> None:
    singles = set()
    for batch in grid(replace(shape, ignore_index=None)):
        has_last = bool((batch.labels[batch.valid] == batch.num_classes - 1).any())
        if batch.num_rows > 1:
            assert has_last, batch.where
        else:
            singles.add(has_last)
    assert singles == {True, False}


def test_make_batch_spreads_labels_unevenly() -> None:
    batch = make_batch("random", (300,), 10, BatchShape((10,)), torch.Generator().manual_seed(0))
    counts = torch.bincount(batch.labels)
    assert counts.max() > 3 * counts.min() > 0


@pytest.mark.parametrize("name", ["default", "tokens", "fused"])
def test_ordinary_rows_have_surprisal_from_a_tenth_to_1(name: str) -> None:
    kinds = [batch for batch in grid(SHAPES[name]) if batch.family == "ordinary"]
    assert len(kinds) == 5
    for batch in kinds:
        assert (surprisal(batch) >= 0.1).all(), batch.where
        assert (surprisal(batch) <= 1.0).all(), batch.where


def test_grid_reaches_both_ends_of_the_core() -> None:
    batches = grid(BatchShape(CLASSES))
    found = torch.cat([surprisal(batch) for batch in batches])
    assert 75 < found.max() <= CORE_GAP
    assert 0 < found.min() < 1e-30
    shifted = [batch.logits.mean(1) for batch in batches if batch.family == "offset"]
    assert max(mean.max() for mean in shifted) > 90
    assert min(mean.min() for mean in shifted) < -45
    for logits in [batch.logits for batch in batches if batch.family == "ties"]:
        assert ((logits == logits.amax(1, keepdim=True)).sum(1) > 1).any()


def test_mixed_batch_has_rows_of_every_kind() -> None:
    batch = make_batch("mixed", (64,), 10, BatchShape((10,)), torch.Generator().manual_seed(0))
    found = surprisal(batch)
    assert (found < 1e-15).any()
    assert (found > 20).any()
    assert ((found > 0.1) & (found < 1)).any()


@pytest.mark.parametrize("name", ["soft", "fused tokens"])
def test_soft_targets_favour_the_label(name: str) -> None:
    spread = False
    for batch in grid(SHAPES[name]):
        targets = batch.target_probs[batch.valid]
        assert torch.equal(targets.sum(-1), torch.ones(len(targets), dtype=torch.float64))
        assert torch.equal(targets * 64, (targets * 64).round())
        of_label = targets.gather(1, batch.labels[batch.valid][:, None])
        assert (of_label >= 0.5).all()
        spread |= bool((targets.count_nonzero(1) > 2).any())
    assert spread


def test_hard_targets_are_the_labels() -> None:
    for batch in grid(BatchShape(NARROW)):
        assert torch.equal(batch.target_probs, F.one_hot(batch.labels, batch.num_classes).double())
        assert batch.valid.all()
    labels = torch.tensor([1, 0])
    assert targets_of(labels, 3, False, torch.Generator()).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("name", ["ignoring", "tokens", "fused tokens"])
def test_ignored_rows_have_the_index_and_no_target(name: str) -> None:
    shape = SHAPES[name]
    batches = grid(shape)
    for batch in batches:
        assert torch.equal(batch.labels == shape.ignore_index, ~batch.valid)
        assert not batch.target_probs[~batch.valid].any()
        assert batch.valid.any()
        if not shape.soft:
            assert torch.equal(batch.target_probs[batch.valid].argmax(-1), batch.labels[batch.valid])
    for family in FAMILIES:
        ignoring = {bool((~batch.valid).any()) for batch in batches if batch.family == family}
        assert ignoring == {True, False}, family


@pytest.mark.parametrize("name", ["fused", "fused tokens"])
def test_fused_logits_are_those_of_the_linear_layer(name: str) -> None:
    for batch in grid(SHAPES[name]):
        assert batch.hidden is not None
        assert batch.weight is not None
        assert (batch.bias is not None) == SHAPES[name].bias
        assert torch.equal(batch.logits, F.linear(batch.hidden, batch.weight, batch.bias))
        assert batch.hidden.shape[:-1] == batch.labels.shape == batch.logits.shape[:-1]
        assert batch.weight.shape == (batch.num_classes, batch.hidden.shape[-1])


def test_token_batches_have_two_leading_dimensions() -> None:
    for batch in grid(BatchShape(NARROW, tokens=True)):
        assert batch.labels.ndim == 2
        assert batch.logits.shape == (*batch.labels.shape, batch.num_classes) == batch.target_probs.shape
        assert batch.num_rows == batch.labels.shape[0] * batch.labels.shape[1]
    assert {tuple(batch.labels.shape) for batch in grid(BatchShape((2,), tokens=True))} == set(TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_at_rounds_inputs_to_the_precision(dtype: torch.dtype) -> None:
    for shape in (BatchShape((2, 10)), BatchShape((2, 10), fused=True, bias=True)):
        for batch in grid(shape):
            low = batch.at(dtype)
            for name in ["logits"] if low.hidden is None else ["hidden", "weight", "bias"]:
                tensor = getattr(low, name)
                assert torch.equal(tensor, tensor.to(dtype).double())
            if low.hidden is not None and low.weight is not None:
                assert torch.equal(low.logits, F.linear(low.hidden, low.weight, low.bias))
            assert batch.at(torch.float32) is batch


def test_rows_selects_the_same_rows_everywhere() -> None:
    batch = make_batch("random", (7,), 3, BatchShape((3,), ignore_index=-1), torch.Generator().manual_seed(1))
    kept = batch.rows(torch.tensor([5, 0]))
    for name in ("logits", "labels", "target_probs", "valid"):
        assert torch.equal(getattr(kept, name), getattr(batch, name)[[5, 0]])


@pytest.mark.usefixtures("untouched_randomness")
def test_grid_is_deterministic_without_global_randomness() -> None:
    first, second = (build_grid(BatchShape((2, 10), soft=True)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.logits, b.logits)
        assert torch.equal(a.target_probs, b.target_probs)


def test_where_describes_the_batch() -> None:
    batch = make_batch("wrong", (2, 6), 10, BatchShape((10,), tokens=True, ignore_index=-1), torch.Generator())
    where = replace(batch, layout="strided", upstream=3.7).where
    assert where == "wrong rows, 2x6 x C=10, 4 ignored, strided, upstream 3.7"
