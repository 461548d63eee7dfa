"""What imports make is left to itself, and only that."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.imports import lasting


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "a_big_library.py").write_text("things = [[] for _ in range(100_000)]")
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_big_library"
    sys.modules.pop("a_big_library", None)


def test_the_collector_neither_sees_an_import_nor_stays_off(big: str, thawed: None) -> None:
    before = gc.get_freeze_count()
    with lasting(big):
        passes = gc.get_stats()[0]["collections"]
        __import__(big)
        assert gc.get_stats()[0]["collections"] == passes
    assert gc.get_freeze_count() > before + 100_000
    assert gc.isenabled()


def test_garbage_from_before_is_gone_and_what_comes_later_is_collected(big: str, thawed: None) -> None:
    class Ring:
        left = 0

        def __init__(self) -> None:
            self.own = self

        def __del__(self) -> None:
            Ring.left += 1

    Ring()
    with lasting(big):
        assert Ring.left == 1
        __import__(big)
    Ring()
    gc.collect()
    assert Ring.left == 2


def test_nothing_is_kept_where_nothing_is_imported(thawed: None) -> None:
    before = gc.get_freeze_count()
    with lasting("sys"):
        pass
    assert gc.get_freeze_count() == before
    with pytest.raises(KeyError), lasting("no_such_library"):
        raise KeyError
    assert gc.isenabled()
