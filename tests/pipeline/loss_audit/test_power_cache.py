"""What a grid catches is measured once for each grid, code and machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from likelihood_lab.audit.context import AuditContext, audit_of
from likelihood_lab.audit.evaluate import Loss
from pipeline.loss_audit import losses as audited
from pipeline.loss_audit import losses as power_cache
from pipeline.loss_audit.losses import keep, recall

POWER = {"label smoothing": {"float32": 1e-5, "float64": None}}
LOSSES = {
    "ce": {"fn": {"_target_": "torch.nn.CrossEntropyLoss"}, "args": ["logits", "labels"]},
    "nll": {"fn": {"_target_": "torch.nn.NLLLoss"}, "args": ["log_probs", "labels"]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "audit_power"


def asked(**about: object) -> AuditContext:
    reference = Loss(torch.nn.functional.cross_entropy, ("logits", "labels"))
    return audit_of(reference, reference.args, **{"num_classes": (3,), **about})  # type: ignore[arg-type]


def test_what_was_kept_is_recalled_for_the_same_grid_alone() -> None:
    assert recall(asked()) is None
    keep(asked(), POWER)
    assert recall(asked()) == POWER
    assert recall(asked(num_classes=(4,))) is None
    assert recall(asked(dtype=torch.bfloat16)) is None
    assert recall(asked(tokens=True)) is None


@pytest.mark.parametrize("changed", ["_code", "_processor"])
def test_other_code_or_another_machine_has_to_measure_again(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(asked(), POWER)
    monkeypatch.setattr(power_cache, changed, lambda: "another")
    assert recall(asked()) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"about": {}, "power": {}}'])
def test_a_damaged_file_is_none(content: str, cache: Path) -> None:
    keep(asked(), POWER)
    (file,) = cache.iterdir()
    file.write_text(content)
    assert recall(asked()) is None


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path / "file" / "below"))
    keep(asked(), POWER)
    assert recall(asked()) is None


def test_an_audit_measures_once_and_says_the_same_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = audited.AuditSettings(num_classes=[3])
    first = audited.audit_losses(LOSSES, "ce", settings)["losses"]["nll"]["would_have_caught"]
    assert first["label smoothing"]["float64"] < 1e-12
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["power"] == first
    jobs: list[str] = []
    run = audited.run_isolated

    def counted(asked: dict[str, object], *rest: object) -> object:
        jobs.extend(asked)
        return run(asked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(audited, "run_isolated", counted)
    assert audited.audit_losses(LOSSES, "ce", settings)["losses"]["nll"]["would_have_caught"] == first
    assert jobs == ["nll"]
