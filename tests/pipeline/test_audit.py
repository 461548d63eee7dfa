"""`python -m pipeline.audit`: table, JSON, pictures, exit code; one loss that misbehaves costs the others nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit import task
from pipeline.config.hydra_glue import run_entry_point
from pipeline.entry import ExitCode

ROOT = Path(__file__).parents[2]
QUICK = ("tracking=none", "num_classes=[2,10]")

LOSSES = """
import os, sys
import torch, torch.nn.functional as F

def aborts(logits, labels):
    os.abort()

def aborts_on_bad_labels(logits, labels):
    if (labels >= logits.shape[1]).any():
        os.abort()
    return F.cross_entropy(logits, labels)

def talks(logits, labels):
    print("how do you do")
    return F.cross_entropy(logits, labels)

def wants_a_gpu(logits, labels):
    raise RuntimeError("Found no NVIDIA driver on your system.")

def returns_rows(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")

def fused(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels), None

class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([0.5, 2.0]))

    def forward(self, logits, labels):
        return F.cross_entropy(logits, labels, weight=self.weight)

class Learns(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, logits, labels):
        return F.cross_entropy(logits / self.temperature, labels)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with losses of a user's own, and their configuration."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "their_losses.py").write_text(LOSSES)
    (folder / "raises_at_import.py").write_text("raise OSError('no such library')\n")
    (folder / "loss").mkdir()
    declared = {name: f"their_losses.{name}" for name in ("aborts", "aborts_on_bad_labels", "talks", "wants_a_gpu")}
    declared |= {"rows": "their_losses.returns_rows", "broken": "raises_at_import.loss", "typo": "their_losses.talk"}
    for name, target in declared.items():
        declare(folder, name, f"{{_target_: {target}, _partial_: true}}", "[logits, labels]")
    declare(folder, "fused", "{_target_: their_losses.fused, _partial_: true}", "[hidden, weight, labels]")
    declare(folder, "weighted", "{_target_: their_losses.Weighted}", "[logits, labels]")
    declare(folder, "learns", "{_target_: their_losses.Learns}", "[logits, labels]")
    return folder


def declare(folder: Path, name: str, fn: str, args: str) -> None:
    (folder / "loss" / f"{name}.yaml").write_text(f"{name}:\n  fn: {fn}\n  args: {args}\n")


def audit(folder: Path, *arguments: str, mine: Path | None = None) -> subprocess.CompletedProcess[str]:
    own = [] if mine is None else ["--config-dir", str(mine)]
    command = [sys.executable, "-m", "pipeline.audit", *QUICK, f"hydra.run.dir={folder}", *arguments, *own]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{mine or ''}"}
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)


def entries(folder: Path) -> dict[str, Any]:
    losses: dict[str, Any] = json.loads((folder / "audit.json").read_text())["losses"]
    return losses


def test_the_textbook_in_one_command(tmp_path: Path) -> None:
    folder = tmp_path / "textbook"
    expect = "expect={nll: identical, kl: same, kl_mean: scaled, nll_softmax: rounding, brier: different}"
    done = audit(folder, "loss=[ce,nll,kl,kl_mean,nll_softmax,brier]", expect)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 expectations hold" in done.stdout
    assert "label smoothing" in done.stdout  # the smallest difference that would have been caught
    written = json.loads((folder / "audit.json").read_text())
    assert (written["schema"], written["reference"]) == (1, "ce")
    contract = {
        "objective", "scale", "offset", "domain", "normaliser", "side_effects", "would_have_caught", "covered",
        "not_covered", "sentence", "evidence",
    }  # fmt: skip
    assert all(contract <= entry.keys() for entry in written["losses"].values())
    assert written["losses"]["kl_mean"]["scale"] == {"formula": "1/C", "by_classes": {"2": 0.5, "10": 0.1}}
    assert written["losses"]["nll"]["would_have_caught"]["label smoothing"]["float64"] < 1e-12
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["audit_strip.svg", "p_minus_y.svg"]


def test_an_expectation_that_fails_is_exit_code_1_and_says_what_was_found(tmp_path: Path) -> None:
    done = audit(tmp_path / "refuted", "loss=[ce,kl_mean]", "expect=same")
    assert done.returncode == 1
    assert "expected kl_mean: same, found scaled" in done.stdout


def test_with_nothing_expected_the_last_line_says_so(tmp_path: Path) -> None:
    done = audit(tmp_path / "plain", "loss=[ce,nll]")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("nothing was asserted")


def test_losses_that_misbehave_are_their_own_finding(tmp_path: Path, mine: Path) -> None:
    folder = tmp_path / "unruly"
    losses = "loss=[ce,aborts,aborts_on_bad_labels,talks,wants_a_gpu,rows,broken,nll]"
    done = audit(folder, losses, "expect={nll: same, talks: same}", mine=mine)
    assert done.returncode == 0, done.stderr
    assert "how do you do" not in done.stdout.partition("side effect")[0]
    found = entries(folder)
    words = {name: entry["objective"] for name, entry in found.items()}
    assert words == {
        "aborts": "error", "aborts_on_bad_labels": "identical", "talks": "identical", "wants_a_gpu": "not_run",
        "rows": "error", "broken": "error", "nll": "identical",
    }  # fmt: skip
    assert "SIGABRT" in found["aborts"]["sentence"]
    assert any("SIGABRT" in effect for effect in found["aborts_on_bad_labels"]["side_effects"])
    assert "prints: how do you do" in found["talks"]["side_effects"]
    assert "the scalar objective is needed" in found["rows"]["sentence"]
    assert "no such library" in found["broken"]["sentence"]


def test_a_loss_that_hangs_is_ended_at_the_time_limit(tmp_path: Path) -> None:
    (tmp_path / "slow_losses.py").write_text("import time\n\ndef hangs(logits, labels):\n    time.sleep(1000)\n")
    (tmp_path / "loss").mkdir()
    declare(tmp_path, "hangs", "{_target_: slow_losses.hangs, _partial_: true}", "[logits, labels]")
    folder = tmp_path / "slow"
    done = audit(folder, "loss=[ce,hangs,nll]", "time_limit=20", mine=tmp_path)
    assert done.returncode == 0, done.stderr
    found = entries(folder)
    assert (found["hangs"]["objective"], found["nll"]["objective"]) == ("error", "identical")
    assert found["hangs"]["sentence"] == "took more than 20 s"


def test_fused_losses_and_weights_of_their_own(tmp_path: Path, mine: Path) -> None:
    folder = tmp_path / "more"
    done = audit(folder, "loss=[ce,fused,weighted,nll]", mine=mine)
    assert done.returncode == 0, done.stderr
    found = entries(folder)
    assert {name: entry["objective"] for name, entry in found.items()} == {
        "fused": "identical", "weighted": "different", "nll": "identical",
    }  # fmt: skip
    assert found["weighted"]["normaliser"]["divides_by"] == "sum of class weights"
    assert found["weighted"]["covered"][0].startswith("40 batches: C = 2;")  # 10 classes are refused: it has 2 weights
    assert found["fused"]["evidence"]["example"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["loss=[ce,nll]", "dtype=bloat16"], "bfloat16"),
        (["loss=[ce,nll]", "device=tpu"], "device=tpu; choose cpu, cuda or cuda:N"),
        (["loss=[ce,nll]", "num_classes=[1]"], "num_classes=[1]; give a list of integers from 2 on"),
        (["loss=[ce,nll]", "num_classes=[1000000000]"], "give a list of integers from 2 on, such as '[2,10]', up to"),
        (["loss=[ce,nll]", f"ignore_index={2**63}"], "ignore_index=9223372036854775808; give a number that a label"),
        (["loss=[ce,nll]", "expect={kl: same}"], "expect names 'kl'"),
        (["loss=[ce,nll]", "jobs=0"], "jobs=0; it must be at least 1"),
        (["loss=[ce,nll]", "+seed=3"], "unknown key 'seed'"),
        (["loss=[ce,nll]", "reference=kl"], "reference=kl is not among the chosen losses"),
        (["loss=[ce]", "expect=same"], "ce is the only loss"),
        (["loss=[ce]"], "ce is the only loss; add one to compare it with"),
        (["loss=[ce,nll]", "loss.ce.fn.reductoin=sum"], "reductoin"),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["audit.py", *QUICK, *arguments])
    with pytest.raises(SystemExit) as left:
        run_entry_point(task)
    told = capsys.readouterr()
    assert left.value.code == ExitCode.USAGE
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("loss", "said"),
    [("typo", "has no callable 'talk' (did you mean 'talks'?)"), ("learns", "trainable parameters of its own")],
)
def test_what_a_child_finds_wrong_with_the_request_is_one_line_too(
    loss: str, said: str, tmp_path: Path, mine: Path
) -> None:
    folder = tmp_path / "refused"
    done = audit(folder, f"loss=[ce,{loss}]", mine=mine)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert said in line
    assert done.stdout == ""
    assert not folder.exists()


def test_the_audit_is_a_report_run_in_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracking.db")
    folder = tmp_path / "tracked"
    done = audit(folder, "loss=[ce,nll,kl_mean]", "tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/tracking.db")
    assert done.returncode == 0, done.stderr
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/tracking.db")
    experiment = client.get_experiment_by_name("likelihood-lab")
    (run,) = client.search_runs([experiment.experiment_id], "tags.kind = 'report'")
    assert run.data.tags["objective.kl_mean"] == "scaled"
    assert run.data.tags["sweep"] == "tracked"
    assert {found.path for found in client.list_artifacts(run.info.run_id)} == {"audit.json", "figures"}


def test_a_trial_s_folder_and_a_path_that_is_none_are_refused(tmp_path: Path) -> None:
    trial = tmp_path / "trial"
    trial.mkdir()
    (trial / "request.yaml").write_text("{}\n")
    (tmp_path / "file").write_text("")
    for folder, said in ((trial, "holds a trial"), (tmp_path / "file", "cannot write to")):
        done = audit(folder, "loss=[ce,nll]")
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = done.stderr.splitlines()
        assert said in line
    assert [path.name for path in trial.iterdir()] == ["request.yaml"]
