"""The detection limits of a grid are measured once for each grid, code and machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from likelihood_lab.audit.context import AuditContext, audit_of
from likelihood_lab.audit.evaluate import Loss
from pipeline.loss_audit import losses
from pipeline.loss_audit.losses import AuditSettings, audit_losses, load_cached, save_cached

LIMITS = {"label smoothing": {"float32": 1e-5, "float64": None}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "audit_power"


def context(**changes: object) -> AuditContext:
    reference = Loss(F.cross_entropy, ("logits", "labels"))
    return audit_of(reference, ("logits", "labels"), **{"num_classes": (3,), **changes})  # type: ignore[arg-type]


def test_cache_serves_same_grid_code_and_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = context()
    assert load_cached(grid) is None
    save_cached(grid, LIMITS)
    assert load_cached(context()) == LIMITS
    for changes in ({"num_classes": (4,)}, {"dtype": torch.bfloat16}, {"tokens": True}):
        assert load_cached(context(**changes)) is None
    for part in ("_code_digest", "_processor"):
        with monkeypatch.context() as patch:
            patch.setattr(losses, part, lambda: "another")
            assert load_cached(grid) is None


def test_unusable_cache_counts_as_absent(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = context()
    save_cached(grid, LIMITS)
    (file,) = cache.iterdir()
    for content in ("", "[]", "{}", '{"about": {}, "power": {}}'):
        file.write_text(content)
        assert load_cached(grid) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path / "file" / "below"))
    save_cached(grid, LIMITS)
    assert load_cached(grid) is None


def test_audit_measures_once_then_reads_the_cache(cache: Path) -> None:
    declared = {
        "ce": {"fn": {"_target_": "torch.nn.CrossEntropyLoss"}, "args": ["logits", "labels"]},
        "nll": {"fn": {"_target_": "torch.nn.NLLLoss"}, "args": ["log_probs", "labels"]},
    }

    def audit() -> object:
        return audit_losses(declared, "ce", AuditSettings(num_classes=[2]))["losses"]["nll"]["would_have_caught"]

    measured = audit()
    assert measured["label smoothing"]["float64"] < 1e-12  # type: ignore[index]
    (file,) = cache.iterdir()
    content = json.loads(file.read_text())
    assert content["power"] == measured
    file.write_text(json.dumps(content | {"power": LIMITS}))
    assert audit() == LIMITS
