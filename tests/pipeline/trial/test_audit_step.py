"""The audit inside a trial: its columns in the verdict, what is cached, and what invalidates it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.report import report
from pipeline.storage.cells import TrialFolder
from pipeline.trial import audit_step
from pipeline.verdict.audit_entry import Audit, AuditEntry, entry_in_force
from pipeline.verdict.outcomes import TrialResults
from pipeline.verdict.plan import Look, read_plan
from tests.trials import FAST, comparisons, trial, verdict, weights

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # torch warns of kl_mean
LOSSES = "loss=[ce,nll,nll_softmax,kl_mean]"


def audit_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "audit.json").read_text())
    return content


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of losses that are, and are not, the same function as cross-entropy."""
    path = tmp_path_factory.mktemp("audited") / "trial"
    expect = "expect={nll: same, nll_softmax: rounding, kl_mean: scaled}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reduction: 'mean' divides")
        assert trial(path, "audit=true", LOSSES, "seed=[0,1]", expect) == ExitCode.HOLDS
    return path


def test_a_trial_audits_its_losses(audited: Path) -> None:
    found = comparisons(audited)
    assert {name: (entry["objective"], entry["verdict"]) for name, entry in found.items()} == {
        "nll": ("identical", "identical"), "nll_softmax": ("rounding", "rounding"), "kl_mean": ("scaled", "different"),
    }  # fmt: skip
    assert found["kl_mean"]["scale"]["formula"] == "1/C"
    assert found["kl_mean"]["sentence"].startswith("A multiple of the same function: k = 1/C in every batch")
    assert "label smoothing" in found["nll"]["would_have_caught"]
    assert found["nll_softmax"]["domain"]["axis"] == "gap"


def test_the_losses_are_audited_on_batches_of_the_training(audited: Path) -> None:
    at = audit_of(audited)["losses"]["nll"]["at_weights"]
    assert at["objective"] == "identical"
    assert at["about"]["steps"] == [1, 9, 18, 36]
    assert "8 of 8 batches" in at["sentence"]  # four steps in two precisions, and no grid
    covered = comparisons(audited)["nll"]["covered"]
    assert "the reference's own logits at steps 1, 9, 18, 36 (seed 0)" in covered


def test_only_a_new_loss_is_audited(audited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shutil.copytree(audited, tmp_path / "t")
    trial(path, "audit=true", LOSSES.replace("]", ",brier]"), "seed=[0,1]")
    assert "auditing brier against ce" in capsys.readouterr().out
    after = audit_of(path)
    assert after["losses"].pop("brier")["objective"] == "different"
    assert after == audit_of(audited)


def test_the_trials_of_a_sweep_audit_their_losses_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other test may audit these losses in this process, which remembers the results."""
    calls = []
    audit_losses = audit_step.audit_losses
    monkeypatch.setattr(audit_step, "audit_losses", lambda *given: calls.append(given) or audit_losses(*given))
    for name, epochs in (("one", 1), ("another", 2)):
        trial(tmp_path / name, "loss=[ce,ce_soft]", "audit=true", f"epochs={epochs}")
    assert len(calls) == 1
    both = [audit_of(tmp_path / name) for name in ("one", "another")]
    at_weights = [entry.pop("at_weights") for audit in both for entry in audit["losses"].values()]
    assert both[0] == both[1]
    assert at_weights[0]["about"] != at_weights[1]["about"]
    trial(tmp_path / "third", "loss=[ce,ce_one_hot]", "audit=true")
    assert len(calls) == 2


def entry_of(name: str, audit: dict[str, Any], folder: Path, *, with_cells: bool = True) -> AuditEntry | None:
    cells = {Replica(c.record.arm, c.record.seed): c for c in TrialFolder(folder).cells()} if with_cells else {}
    return entry_in_force(name, Audit.from_json(audit), TrialResults(cells, *read_plan(folder), Look(1, 0.05)))


def test_an_audit_of_other_code_or_reference_is_ignored(audited: Path) -> None:
    audit = audit_of(audited)
    assert entry_of("nll", audit, audited) is not None
    audit["losses"]["nll"]["made_from"]["loss_code"] = "other"
    assert entry_of("nll", audit, audited) is None
    assert entry_of("kl_mean", audit, audited) is not None
    assert entry_of("kl_mean", audit | {"reference": "nll"}, audited) is None
    audit["reference_made_from"]["torch"] = "1.0"
    assert entry_of("kl_mean", audit, audited) is None


@pytest.mark.parametrize(
    ("at_weights", "word"), [("different", "different"), ("error", "identical"), ("rounding", "identical")]
)
def test_a_difference_at_the_trial_s_weights_decides(at_weights: str, word: str, audited: Path) -> None:
    audit = audit_of(audited)
    audit["losses"]["nll"]["at_weights"] |= {"objective": at_weights, "sentence": "wrong there"}
    entry = entry_of("nll", audit, audited, with_cells=False)
    assert entry is not None
    assert entry.objective == word
    if word == "different":
        assert entry.sentence == "the same function on the grid, but not at this trial's own weights: wrong there"


def test_lr_scale_undoes_a_factor_in_the_loss(tmp_path: Path) -> None:
    mean = "{_target_: torch.nn.KLDivLoss, reduction: mean}"
    declared = f"+loss.faster={{fn: {mean}, args: [log_probs, target_probs], lr_scale: 10}}"
    trial(tmp_path / "t", "loss=[ce,kl_mean]", declared, "seed=[0]", "audit=true")
    slow, fast = verdict(tmp_path / "t")["comparisons"]
    assert (slow["objective"], fast["objective"]) == ("scaled", "scaled")
    assert "10 times the reference's learning rate" in fast["sentence"]
    assert "learning rate" not in slow["sentence"]
    reference = weights(tmp_path / "t", "ce", 0)
    apart = {
        arm: max((mine[name] - reference[name]).abs().max().item() for name in mine)
        for arm in ("kl_mean", "faster")
        if (mine := weights(tmp_path / "t", arm, 0))
    }
    assert apart["faster"] < 1e-5 < 1e-2 < apart["kl_mean"]


def smoothed_in_bfloat16(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    smoothing = 0.5 if logits.dtype == torch.bfloat16 else 0.0
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def test_a_trial_in_bfloat16_is_audited_in_it(tmp_path: Path) -> None:
    loss = f"{{fn: {{_target_: {__name__}.smoothed_in_bfloat16, _partial_: true}}, args: [logits, labels]}}"
    request = ("audit=true", "precision=bf16_mixed", "loss=[ce]", f"+loss.sly={loss}", "seed=[0,1]")
    trial(tmp_path / "t", *request, "epochs=1")
    (entry,) = verdict(tmp_path / "t")["comparisons"]
    assert entry["objective"] == "different"
    sentence = "A different function: the same function in float32 and float64, but not in bfloat16"
    assert entry["sentence"].startswith(sentence)
    assert any("bfloat16" in text for text in entry["covered"])


def test_a_loss_that_diverges_alone_is_never_the_same(tmp_path: Path) -> None:
    """The learning rate drives the logits out of the domain of log(softmax)."""
    model = ("model.hidden=[128]", "optimizer.lr=2.5", "epochs=3")
    request = ("audit=true", "loss=[ce,nll_softmax]", "seed=[0,1,2]", *model)
    assert trial(tmp_path / "t", *request, "expect=same") == ExitCode.REFUTED
    (entry,) = verdict(tmp_path / "t")["comparisons"]
    assert entry["failures"]
    assert entry["verdict"] in ("conflict", "different")


def test_the_audit_ends_with_more_threads(tmp_path: Path) -> None:
    """Forked subprocesses can hang where the parent has used several threads."""
    command = [
        sys.executable, "-m", "pipeline.train", *FAST, "audit=true", "loss=[ce,nll]", "seed=0", "trainer.threads=2",
        "batch_size=512", f"hydra.run.dir={tmp_path / 't'}",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == ExitCode.HOLDS, done.stderr
    assert comparisons(tmp_path / "t")["nll"]["objective"] == "identical"


def test_a_report_about_another_reference(tmp_path: Path) -> None:
    """It leaves out the controls of the trial's reference, and the audit."""
    trial(tmp_path / "t", "loss=[ce,nll,brier]", "seed=[0]", "audit=true", "protocol.controls=all")
    page = (tmp_path / "t" / "report.html").read_text()
    assert "Losses: label smoothing by" in page
    assert "margin that the placebos pass" not in page  # one seed shows no placebo equal
    assert verdict(tmp_path / "t")["controls"]["replay"]["bitwise"]
    report([str(tmp_path / "t"), "reference=nll"])
    page = (tmp_path / "t" / "report.html").read_text()
    assert "Losses: unknown, because they were not audited." in page
    assert "How far gradients are" not in page  # they were measured from another reference
    nothing = {"replay": None, "outcomes": {}, "metrics": {}, "assay_sensitivity": None}
    assert verdict(tmp_path / "t")["controls"] == nothing
    assert "not deterministic" not in str(verdict(tmp_path / "t")["comparisons"])
