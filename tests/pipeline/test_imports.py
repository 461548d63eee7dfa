"""Imports: nothing is imported that is not needed, and the garbage collector is paused meanwhile."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.entry import gc_paused_import


@pytest.mark.parametrize(
    ("load", "absent"),
    [
        ("pipeline.train --help", ("torch", "pytorch_lightning", "mlflow", "pandas")),
        ("pipeline.audit --help", ("torch", "pytorch_lightning", "mlflow", "pandas")),
        ("likelihood_lab check --help", ("torch", "scipy", "hydra")),
        ("pipeline.loss_audit.command", ("pytorch_lightning", "mlflow", "matplotlib", "sklearn")),
        ("pipeline.tracking.recorder", ("torch", "pytorch_lightning", "mlflow", "pandas")),
        ("pipeline.trial.conclude", ("pytorch_lightning", "mlflow", "sklearn")),
    ],
)
def test_nothing_is_imported_that_is_not_needed(load: str, absent: tuple[str, ...]) -> None:
    module, *arguments = load.split()
    run = f"runpy.run_module({module!r}, run_name='__main__')" if arguments else f"__import__({module!r})"
    code = f"""
import runpy, sys
sys.argv = {[module, *arguments]!r}
try:
    {run}
except SystemExit as end:
    assert not end.code
print(sorted(set({absent!r}) & set(sys.modules)), {module.partition(".")[0]!r} in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] True"


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
    with gc_paused_import(big):
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
    with gc_paused_import(big):
        assert Ring.left == 1
        __import__(big)
    Ring()
    gc.collect()
    assert Ring.left == 2


def test_nothing_is_kept_where_nothing_is_imported(thawed: None) -> None:
    before = gc.get_freeze_count()
    with gc_paused_import("sys"):
        pass
    assert gc.get_freeze_count() == before
    with pytest.raises(KeyError), gc_paused_import("no_such_library"):
        raise KeyError
    assert gc.isenabled()
