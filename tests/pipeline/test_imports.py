"""Imports: no command loads what it does not need, and the garbage collector is paused meanwhile."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.entry import gc_paused_import

ENTRY_POINTS = [f"pipeline.{name}" for name in ("train", "audit", "report", "sync", "server")]


@pytest.mark.parametrize(
    ("helps", "modules", "absent"),
    [
        (ENTRY_POINTS, ["pipeline.tracking.recorder"], {"torch", "pytorch_lightning", "mlflow", "pandas"}),
        (["likelihood_lab check"], ["likelihood_lab"], {"torch", "scipy", "hydra"}),
        (
            [],
            ["pipeline.loss_audit.command", "pipeline.trial.conclude"],
            {"pytorch_lightning", "mlflow", "matplotlib", "sklearn"},
        ),
    ],
)
def test_imports_stay_small(helps: list[str], modules: list[str], absent: set[str]) -> None:
    """Neither `--help` of the commands nor an import of the modules loads a package of `absent`."""
    code = f"""
import importlib, runpy, sys
for command in {helps!r}:
    sys.argv = [*command.split(), "--help"]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code
for module in {modules!r}:
    importlib.import_module(module)
print(sorted({absent!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("usage: ") >= len(helps)


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "a_big_library.py").write_text("things = [[] for _ in range(100_000)]")
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_big_library"
    sys.modules.pop("a_big_library", None)
    gc.unfreeze()


class Cycle:
    deleted = 0

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        Cycle.deleted += 1


def test_paused_import_freezes_new_objects_only(big: str) -> None:
    """Earlier garbage is collected before, later garbage after; the import itself causes no collection."""
    Cycle.deleted = 0
    Cycle()
    before = gc.get_freeze_count()
    with gc_paused_import(big):
        assert Cycle.deleted == 1
        collections = gc.get_stats()[0]["collections"]
        __import__(big)
        assert gc.get_stats()[0]["collections"] == collections
    assert gc.get_freeze_count() > before + 100_000
    assert gc.isenabled()
    Cycle()
    gc.collect()
    assert Cycle.deleted == 2


def test_paused_import_of_loaded_or_missing_module(big: str) -> None:
    before = gc.get_freeze_count()
    with gc_paused_import("sys"):
        pass
    assert gc.get_freeze_count() == before
    with pytest.raises(KeyError), gc_paused_import(big):
        raise KeyError
    assert gc.isenabled()
