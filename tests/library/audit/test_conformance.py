"""The audit against pairs whose verdict is known: the catalogue, and faults planted where a plain grid is blind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.audit import catalogue
from experiments.audit.case import Case
from experiments.audit.catalogue import CATALOGUE, SOURCES, row_number
from likelihood_lab.audit.api import check
from likelihood_lab.audit.classify import separating
from likelihood_lab.audit.compare import BatchComparison
from likelihood_lab.audit.finding import SAME_FUNCTION, Finding
from likelihood_lab.audit.rounding import ScaleInterval
from likelihood_lab.categorical.batches import BatchShape, make_batch

ROWS = range(1, 47)
RUNNABLE = [case for case in CATALOGUE if case.fn is not None]


# --- the catalogue


@pytest.mark.parametrize("case", RUNNABLE, ids=lambda case: case.row)
def test_the_audit_agrees_with_the_catalogue(case: Case) -> None:
    assert case.fn is not None
    found = check(case.fn, case.reference, args=case.args, reference_args=case.reference_args, **case.options)
    assert found.objective == case.objective, found.sentence
    if case.domain is None:
        assert found.domain is None, found.domain
    else:
        assert found.domain is not None
        axis, limit = case.domain
        assert found.domain.axis == axis
        assert limit is None or found.domain.limit == pytest.approx(limit, rel=0.01)
    expected = [any(effect.startswith(name) for effect in found.side_effects) for name in case.side_effects]
    assert all(expected), found.side_effects
    unexpected = [effect for effect in found.side_effects if not effect.startswith(case.side_effects or ("-",))]
    assert not unexpected
    if case.normaliser is not None:
        assert found.normaliser is not None
        assert found.normaliser.divides_by == case.normaliser


def test_every_row_is_there_with_its_source_and_those_outside_with_a_reason() -> None:
    assert {row_number(case) for case in CATALOGUE} == set(ROWS) == set(SOURCES)
    names = [case.row for case in CATALOGUE]
    assert len(names) == len(set(names))
    assert names == sorted(names, key=lambda row: (int(row.rstrip("abcdefgh")), row))
    for case in CATALOGUE:
        if case.fn is None:
            assert case.outside is not None
            assert case.outside.startswith("because ")
        else:
            assert case.objective is not None
            assert case.outside is None


def test_the_table_has_one_row_a_case() -> None:
    head, rule, *rows = catalogue.markdown().splitlines()
    assert head.startswith("| row | case | source ")
    assert set(rule) <= set("|- ")
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [case.row for case in CATALOGUE]
    columns = len(catalogue.COLUMNS)
    assert all(row.count(" | ") == columns - 1 for row in rows)


# --- planted faults; each is cross-entropy but for one circumstance


def smoothed_where(condition: Callable[[Tensor, Tensor], bool]) -> Callable[[Tensor, Tensor], Tensor]:
    """Label smoothing of 1e-3 under a condition, exact otherwise."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=1e-3 if condition(logits, labels) else 0.0)

    return loss


def last_class_heavier(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows of the last class weigh 1.001, over N."""
    weights = 1 + 1e-3 * (labels == logits.shape[1] - 1)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).mean()


def as_if_contiguous(logits: Tensor, labels: Tensor) -> Tensor:
    """Reads the memory row by row, whatever the strides."""
    classes = logits.shape[1]
    return F.cross_entropy(torch.as_strided(logits, logits.shape, (classes, 1)), labels)


class IgnoringUpstream(torch.autograd.Function):
    """The gradient of the loss itself, whatever reaches it from outside."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(labels), None


def ignoring_upstream(logits: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = IgnoringUpstream.apply(logits, labels)
    return value


def noisy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits + 1e-7 * torch.randn_like(logits), labels)


def overwriting(logits: Tensor, labels: Tensor) -> Tensor:
    value = F.cross_entropy(logits.clone(), labels)
    logits.data.sub_(logits.data.amax(1, keepdim=True))
    return value


PLANTED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str | None]] = {
    "ignores upstream": (ignoring_upstream, "where a gradient other than 1 reaches it from outside"),
    "more than 64 rows": (smoothed_where(lambda z, y: len(y) > 64), "in batches of more than 64 rows"),
    "one row": (smoothed_where(lambda z, y: len(y) == 1), "in a batch of one row"),
    "seven rows": (smoothed_where(lambda z, y: len(y) == 7), None),
    "more than 10 classes": (smoothed_where(lambda z, y: z.shape[1] > 10), "for more than 10 classes"),
    "last class": (last_class_heavier, "in rows of the last class"),
    "not contiguous": (smoothed_where(lambda z, y: not z.is_contiguous()), "on inputs that are not contiguous"),
    "raw memory": (as_if_contiguous, "on inputs that are not contiguous"),
    "float32": (smoothed_where(lambda z, y: z.dtype == torch.float32), "in float32"),
    "float64": (smoothed_where(lambda z, y: z.dtype == torch.float64), "in float64"),
    "large logits": (smoothed_where(lambda z, y: bool(z.abs().max() > 90)), None),
    "ties": (smoothed_where(lambda z, y: bool((z == z[0, 0]).all())), None),
}


@pytest.mark.parametrize(("fn", "trait"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found_and_the_one_trait_that_separates_is_named(
    fn: Callable[[Tensor, Tensor], Tensor], trait: str | None
) -> None:
    found = check(fn, num_classes=(2, 10, 100))
    assert found.objective == ("different" if trait else found.objective)
    assert not found.same, found.sentence
    if trait is not None:
        assert f"wrong {trait}" in found.sentence


def test_a_batch_whose_gradient_is_too_small_to_tell_does_not_hide_the_trait() -> None:
    seen = make_batch("random", (8,), 2, BatchShape((2,)), torch.Generator().manual_seed(0))
    strided, known = replace(seen, layout="strided"), ScaleInterval(1.0, 1e-9)
    wrong = BatchComparison(strided, torch.float64, units=100.0, interval=known)
    right = BatchComparison(seen, torch.float64, units=1.0, interval=known)
    mute = BatchComparison(strided, torch.float64, units=1.0)
    trait = [("on strided inputs", lambda case: case.batch.layout == "strided")]
    assert separating([wrong, right], [wrong], trait) == "on strided inputs"
    assert separating([wrong, right, mute], [wrong], trait) == "on strided inputs"
    assert separating([wrong, right, replace(mute, interval=known)], [wrong], trait) is None
    assert separating([wrong, mute], [wrong], trait) is None  # nothing is known to be right


def test_without_a_fault_no_trait_is_named() -> None:
    found = check(smoothed_where(lambda z, y: False), num_classes=(2, 10, 100))
    assert found.objective == "identical"
    assert "wrong" not in found.sentence


def test_noise_on_the_input_is_different() -> None:
    with torch.random.fork_rng(devices=[]):
        found = check(noisy, num_classes=(2, 10))
    assert found.objective == "different"
    assert "consumes random numbers" in found.side_effects
    assert "equal calls" in found.sentence


def test_fixed_noise_on_the_input_is_different_too() -> None:
    def perturbed(logits: Tensor, labels: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(logits.numel())
        noise = torch.randn(logits.shape, generator=draw, dtype=logits.dtype)
        return F.cross_entropy(logits + 1e-7 * noise, labels)

    assert check(perturbed, num_classes=(2, 10)).objective == "different"


def test_an_overwritten_input_keeps_the_word_and_is_named() -> None:
    found = check(overwriting, num_classes=(2, 10))
    assert found.objective == "identical"
    assert "overwrites logits" in found.side_effects


def changing_after(calls: int, rows: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """Label smoothing in batches of more than `rows` rows, after so many calls."""
    seen = [0]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen[0] += 1
        late = seen[0] > calls and len(labels) > rows
        return F.cross_entropy(logits, labels, label_smoothing=1e-3 if late else 0.0)

    return loss


def flag(found: Finding) -> int:
    """After how many calls a change would show no more, as the finding says."""
    (entry,) = [entry for entry in found.not_covered if entry.startswith("state that shows only after more than ")]
    return int(entry.split()[7])


@pytest.mark.parametrize("calls", [0, 1, 80, 159])
def test_a_loss_that_changes_within_the_calls_that_are_made_is_not_the_same(calls: int) -> None:
    found = check(changing_after(calls), num_classes=(2, 10))
    assert not found.same, found.sentence
    assert flag(found) == 160


def test_a_loss_that_changes_for_larger_batches_alone_is_met_by_the_second_round() -> None:
    found = check(changing_after(80, rows=7), num_classes=(2, 10))
    assert found.objective == "different"
    assert "equal calls" in found.sentence


@pytest.mark.parametrize("calls", [200, 1000])
def test_a_loss_that_changes_later_is_the_same_at_most_under_the_flag(calls: int) -> None:
    found = check(changing_after(calls), num_classes=(2, 10))
    assert not found.same or flag(found) < calls


def test_the_words_of_sameness_are_three() -> None:
    assert set(SAME_FUNCTION) == {"identical", "rounding", "offset"}
