"""Looks at growing data: counted in a file that only grows, and sharing one alpha."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from likelihood_lab.errors import UsageError
from pipeline.verdict.plan import FILE, Look, level_of, look_at, record

TESTED = {"mine": "inconclusive"}


def look(folder: Path, count: int, declared: int = 1, words: dict[str, str] = TESTED, alpha: float = 0.05) -> Look:
    found = look_at(folder, range(count), "ce", alpha, declared)
    record(folder, found, range(count), "ce", words)
    return found


@pytest.mark.parametrize("declared", [1, 2, 3, 5])
def test_level_of_declared_looks_sums_to_alpha(declared: int) -> None:
    """However many looks follow, all levels sum to less than twice alpha."""
    levels = [level_of(0.05, declared, k) for k in range(1, 60)]
    assert sum(levels[:declared]) == pytest.approx(0.05)
    assert levels == sorted(levels, reverse=True)
    assert 0.05 < sum(levels) <= 0.1


def test_look_at_more_seeds_is_the_next(tmp_path: Path) -> None:
    found = [look(tmp_path, count) for count in (10, 10, 20, 40, 20)]
    assert [(each.number, each.level) for each in found] == [
        (1, 0.05), (1, 0.05), (2, 0.025), (3, 0.0125), (2, 0.025),
    ]  # fmt: skip
    assert len((tmp_path / FILE).read_text().splitlines()) == 3


def test_look_at_levels_of_two_declared_looks(tmp_path: Path) -> None:
    assert [look(tmp_path, count, declared=2).level for count in (10, 20, 30)] == [0.025, 0.025, 0.0125]


def test_look_at_ignores_the_order_of_seeds(tmp_path: Path) -> None:
    record(tmp_path, Look(1, 0.05), [2, 0, 1], "ce", TESTED)
    assert look_at(tmp_path, [0, 1, 2], "ce", 0.05, 1).number == 1


def test_record_skips_a_look_without_a_test(tmp_path: Path) -> None:
    look(tmp_path, 3, words={"nll": "identical", "kl": "identical"})
    assert not (tmp_path / FILE).exists()
    assert look(tmp_path, 10).number == 1


def test_look_at_another_question_is_the_next(tmp_path: Path) -> None:
    look(tmp_path, 10)
    assert look_at(tmp_path, range(10), "other margins", 0.05, 1) == Look(2, 0.025)


def test_look_at_keeps_the_first_declaration(tmp_path: Path) -> None:
    look(tmp_path, 3)
    later = [look(tmp_path, count, declared=declared, alpha=0.2) for count, declared in ((4, 2), (5, 3))]
    assert [each.level for each in later] == [0.025, 0.0125]


def test_record_only_grows(tmp_path: Path) -> None:
    look(tmp_path, 10)
    before = (tmp_path / FILE).read_text()
    look(tmp_path, 20)
    assert (tmp_path / FILE).read_text().startswith(before)
    assert json.loads(before) == {
        "number": 1, "level": 0.05, "alpha": 0.05, "declared": 1, "question": "ce", "seeds": list(range(10)),
        "words": TESTED,
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["{", "[]", '{"seeds": [0]}'])
def test_damaged_record_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE).write_text(damage + "\n")
    with pytest.raises(UsageError, match="counts the looks"):
        look(tmp_path, 10)


@pytest.mark.parametrize(("declared", "number"), [(0, 1), (1, 0)])
def test_level_of_counts_from_one(declared: int, number: int) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        level_of(0.05, declared, number)
