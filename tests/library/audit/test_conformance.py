"""The audit against pairs whose word is known: the catalogue, and faults that a plain grid of batches misses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.audit import catalogue
from experiments.audit.case import Case
from experiments.audit.catalogue import CATALOGUE, SOURCES, row_number
from likelihood_lab import check
from likelihood_lab.audit.classify import separating
from likelihood_lab.audit.compare import BatchComparison
from likelihood_lab.audit.finding import Finding
from likelihood_lab.audit.rounding import ScaleInterval
from likelihood_lab.categorical.batches import BatchShape, make_batch
from likelihood_lab.categorical.inputs import LossFn
from tests.library.audit.shared import by_hand, logit_gradient, quick, smoothed_where

# --- the catalogue


@pytest.mark.parametrize("case", [case for case in CATALOGUE if case.fn is not None], ids=lambda case: case.row)
def test_audit_agrees_with_the_catalogue(case: Case) -> None:
    found = check(case.fn, case.reference, args=case.args, reference_args=case.reference_args, **case.options)
    assert found.objective == case.objective, found.sentence
    if case.domain is None:
        assert found.domain is None, found.domain
    else:
        axis, limit = case.domain
        assert found.domain.axis == axis
        assert limit is None or found.domain.limit == pytest.approx(limit, rel=0.01)
    expected = [any(effect.startswith(name) for effect in found.side_effects) for name in case.side_effects]
    assert all(expected), found.side_effects
    unexpected = [effect for effect in found.side_effects if not effect.startswith(case.side_effects or ("-",))]
    assert not unexpected
    assert case.normaliser is None or found.normaliser.divides_by == case.normaliser


def test_catalogue_rows_have_sources_and_reasons() -> None:
    assert {row_number(case) for case in CATALOGUE} == set(range(1, 47)) == set(SOURCES)
    names = [case.row for case in CATALOGUE]
    assert len(names) == len(set(names))
    assert names == sorted(names, key=lambda row: (int(row.rstrip("abcdefgh")), row))
    for case in CATALOGUE:
        if case.fn is None:
            assert case.outside.startswith("because ")
        else:
            assert case.objective is not None
            assert case.outside is None


def test_catalogue_table_has_one_row_for_each_case() -> None:
    head, rule, *rows = catalogue.markdown().splitlines()
    assert head.startswith("| row | case | source ")
    assert set(rule) <= set("|- ")
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [case.row for case in CATALOGUE]
    assert all(row.count(" | ") == len(catalogue.COLUMNS) - 1 for row in rows)


# --- planted faults; each is cross-entropy except in one circumstance


def last_class_heavier(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows of the last class weigh 1.001, over N."""
    weights = 1 + 1e-3 * (labels == logits.shape[1] - 1)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).mean()


def as_if_contiguous(logits: Tensor, labels: Tensor) -> Tensor:
    """Reads the memory row by row, whatever the strides."""
    return F.cross_entropy(torch.as_strided(logits, logits.shape, (logits.shape[1], 1)), labels)


PLANTED: dict[str, tuple[LossFn, str | None]] = {
    "ignores upstream": (
        by_hand(lambda ctx, upstream: logit_gradient(*ctx.saved_tensors)),
        "where a gradient other than 1 reaches it from outside",
    ),
    "more than 64 rows": (smoothed_where(lambda z, y: len(y) > 64), "in batches of more than 64 rows"),
    "one row": (smoothed_where(lambda z, y: len(y) == 1), "in a batch of one row"),
    "seven rows": (smoothed_where(lambda z, y: len(y) == 7), None),
    "more than 10 classes": (smoothed_where(lambda z, y: z.shape[1] > 10), "for more than 10 classes"),
    "last class": (last_class_heavier, "in rows of the last class"),
    "not contiguous": (smoothed_where(lambda z, y: not z.is_contiguous()), "on inputs that are not contiguous"),
    "raw memory": (as_if_contiguous, "on inputs that are not contiguous"),
    "float32": (smoothed_where(lambda z, y: z.dtype == torch.float32), "in float32"),
    "float64": (smoothed_where(lambda z, y: z.dtype == torch.float64), "in float64"),
    "large logits": (smoothed_where(lambda z, y: z.abs().max() > 90), None),
    "ties": (smoothed_where(lambda z, y: (z == z[0, 0]).all()), None),
}


@pytest.mark.parametrize(("fn", "trait"), PLANTED.values(), ids=PLANTED)
def test_planted_fault_is_found_and_its_trait_named(fn: LossFn, trait: str | None) -> None:
    found = check(fn, num_classes=(2, 10, 100))
    assert not found.same, found.sentence
    if trait is not None:
        assert found.objective == "different"
        assert f"wrong {trait}" in found.sentence


def test_no_fault_has_no_trait() -> None:
    found = check(smoothed_where(lambda z, y: False), num_classes=(2, 10, 100))
    assert found.objective == "identical"
    assert "wrong" not in found.sentence


def test_trait_is_named_in_spite_of_a_tiny_gradient() -> None:
    """A batch whose gradient is too small to compare does not count."""
    batch = make_batch("random", (8,), 2, BatchShape((2,)), torch.Generator().manual_seed(0))
    strided, known = replace(batch, layout="strided"), ScaleInterval(1.0, 1e-9)
    wrong = BatchComparison(strided, torch.float64, units=100.0, interval=known)
    right = BatchComparison(batch, torch.float64, units=1.0, interval=known)
    tiny = BatchComparison(strided, torch.float64, units=1.0)
    trait = [("on strided inputs", lambda case: case.batch.layout == "strided")]
    assert separating([wrong, right], [wrong], trait) == "on strided inputs"
    assert separating([wrong, right, tiny], [wrong], trait) == "on strided inputs"
    assert separating([wrong, right, replace(tiny, interval=known)], [wrong], trait) is None
    assert separating([wrong, tiny], [wrong], trait) is None  # nothing is known to be right


def test_noise_on_the_input_is_different() -> None:
    def noisy(logits: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
        return F.cross_entropy(logits + 1e-7 * noise, labels)

    with torch.random.fork_rng(devices=[]):
        found = quick(noisy)
    assert found.objective == "different"
    assert "consumes random numbers" in found.side_effects
    assert "equal calls" in found.sentence
    fixed = quick(lambda z, y: noisy(z, y, torch.Generator().manual_seed(z.numel())))
    assert fixed.objective == "different"


# --- losses that change with the number of calls


def changing_after(calls: int, rows: int = 0) -> LossFn:
    """Label smoothing in batches of more than `rows` rows, after so many calls."""
    count = [0]

    def is_late(logits: Tensor, labels: Tensor) -> bool:
        count[0] += 1
        return count[0] > calls and len(labels) > rows

    return smoothed_where(is_late)


def covered_calls(found: Finding) -> int:
    """The number of calls after which a change is not detected, according to the finding."""
    (entry,) = [entry for entry in found.not_covered if entry.startswith("state that shows only after more than ")]
    return int(entry.split()[7])


@pytest.mark.parametrize("calls", [0, 1, 80, 159])
def test_change_within_the_calls_is_found(calls: int) -> None:
    found = quick(changing_after(calls))
    assert not found.same, found.sentence
    assert covered_calls(found) == 160


def test_change_in_large_batches_is_found_by_repetition() -> None:
    found = quick(changing_after(80, rows=7))
    assert found.objective == "different"
    assert "equal calls" in found.sentence


@pytest.mark.parametrize("calls", [200, 1000])
def test_change_after_the_calls_is_declared_not_covered(calls: int) -> None:
    found = quick(changing_after(calls))
    assert not found.same or covered_calls(found) < calls
