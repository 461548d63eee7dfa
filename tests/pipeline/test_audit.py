"""`python -m pipeline.audit`: table, JSON, figures and exit code; a misbehaving loss does not affect the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit import task
from pipeline.config.hydra_glue import run_entry_point
from pipeline.entry import ExitCode

ROOT = Path(__file__).parents[2]
QUICK = ("tracking=none", "num_classes=[2,10]")

Audit = Callable[..., tuple[int, str, str]]

LOSSES = """
import os, time
import torch, torch.nn.functional as F

def aborts(logits, labels):
    os.abort()

def hangs(logits, labels):
    time.sleep(1000)

def aborts_on_bad_labels(logits, labels):
    if (labels >= logits.shape[1]).any():
        os.abort()
    return F.cross_entropy(logits, labels)

def talks(logits, labels):
    print("how do you do")
    return F.cross_entropy(logits, labels)

def wants_a_gpu(logits, labels):
    raise RuntimeError("Found no NVIDIA driver on your system.")

def rows(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")

def fused(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels), None

class Weighted(torch.nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__(weight=torch.tensor([0.5, 2.0]))

class Learns(torch.nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(()))
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's own losses and their configuration."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "their_losses.py").write_text(LOSSES)
    (folder / "raises_at_import.py").write_text("raise OSError('no such library')\n")
    (folder / "loss").mkdir()
    functions = ("aborts", "aborts_on_bad_labels", "hangs", "talks", "wants_a_gpu", "rows", "fused")
    declared = {name: f"{{_target_: their_losses.{name}, _partial_: true}}" for name in functions}
    declared |= {name: f"{{_target_: their_losses.{name.title()}}}" for name in ("weighted", "learns")}
    declared["typo"] = "{_target_: their_losses.talk, _partial_: true}"
    declared["broken"] = "{_target_: raises_at_import.loss, _partial_: true}"
    for name, fn in declared.items():
        args = "[hidden, weight, labels]" if name == "fused" else "[logits, labels]"
        (folder / "loss" / f"{name}.yaml").write_text(f"{name}:\n  fn: {fn}\n  args: {args}\n")
    return folder


@pytest.fixture
def audit(tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Audit:
    """Run the command in this process; it returns the exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["audit.py", *QUICK, *arguments, "--config-dir", str(mine)])
        with pytest.raises(SystemExit) as left:
            run_entry_point(task)
        assert isinstance(left.value.code, int)
        return (left.value.code, *capfd.readouterr())

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(mine)
    return run


def entries(folder: Path) -> dict[str, Any]:
    losses: dict[str, Any] = json.loads((folder / "audit.json").read_text())["losses"]
    return losses


def test_audit_command_on_textbook_losses(tmp_path: Path) -> None:
    """The command line writes table, JSON and figures, and records them as a report run in MLflow."""
    folder, uri = tmp_path / "tracked", f"sqlite:///{tmp_path}/tracking.db"
    command = [
        sys.executable, "-m", "pipeline.audit", "num_classes=[2,10]", f"hydra.run.dir={folder}",
        "loss=[ce,nll,kl,kl_mean,nll_softmax,brier]", f"tracking.uri={uri}",
        "expect={nll: identical, kl: same, kl_mean: scaled, nll_softmax: rounding, brier: different}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 expectations hold" in done.stdout
    assert "label smoothing" in done.stdout  # the detection limits
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

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("likelihood-lab")
    (run,) = client.search_runs([experiment.experiment_id], "tags.kind = 'report'")
    assert (run.data.tags["objective.kl_mean"], run.data.tags["sweep"]) == ("scaled", "tracked")
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} == {"audit.json", "figures"}


def test_exit_code_and_last_line_follow_expectations(audit: Audit) -> None:
    code, output, errors = audit("loss=[ce,kl_mean]", "expect=same")
    assert code == ExitCode.REFUTED, errors
    assert "expected kl_mean: same, found scaled" in output
    code, output, _ = audit("loss=[ce,kl_mean]")
    assert code == ExitCode.HOLDS
    assert output.splitlines()[-1].startswith("nothing was asserted")


def test_misbehaving_losses_do_not_affect_others(audit: Audit, tmp_path: Path) -> None:
    losses = "loss=[ce,aborts,aborts_on_bad_labels,talks,wants_a_gpu,rows,broken,weighted,nll]"
    code, output, errors = audit(losses, "expect={nll: same, talks: same}", f"hydra.run.dir={tmp_path}")
    assert code == ExitCode.HOLDS, errors
    assert "how do you do" not in output.partition("side effect")[0]
    found = entries(tmp_path)
    assert {name: entry["objective"] for name, entry in found.items()} == {
        "aborts": "error", "aborts_on_bad_labels": "identical", "talks": "identical", "wants_a_gpu": "not_run",
        "rows": "error", "broken": "error", "weighted": "different", "nll": "identical",
    }  # fmt: skip
    assert "SIGABRT" in found["aborts"]["sentence"]
    assert any("SIGABRT" in effect for effect in found["aborts_on_bad_labels"]["side_effects"])
    assert "prints: how do you do" in found["talks"]["side_effects"]
    assert "the scalar objective is needed" in found["rows"]["sentence"]
    assert "no such library" in found["broken"]["sentence"]
    assert found["weighted"]["normaliser"]["divides_by"] == "sum of class weights"
    assert found["weighted"]["covered"][0].startswith("40 batches: C = 2;")  # its 2 weights refuse 10 classes


def test_hanging_loss_ends_at_time_limit(audit: Audit, tmp_path: Path) -> None:
    code, _, errors = audit("loss=[ce,hangs]", "time_limit=1", f"hydra.run.dir={tmp_path}")
    assert code == ExitCode.HOLDS, errors
    found = entries(tmp_path)["hangs"]
    assert (found["objective"], found["sentence"]) == ("error", "took more than 1 s")


def test_fused_loss_is_audited(audit: Audit, tmp_path: Path) -> None:
    code, _, errors = audit("loss=[ce,fused]", "num_classes=[2]", f"hydra.run.dir={tmp_path}")
    assert code == ExitCode.HOLDS, errors
    found = entries(tmp_path)["fused"]
    assert (found["objective"], found["evidence"]["example"]) == ("identical", None)


@pytest.mark.parametrize(
    ("arguments", "problem"),
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
        (["loss=[ce]"], "ce is the only loss; add one to compare it with"),
        (["loss=[ce,nll]", "loss.ce.fn.reductoin=sum"], "reductoin"),
        (["loss=[ce,typo]"], "has no callable 'talk' (did you mean 'talks'?)"),  # these two are found in a subprocess
        (["loss=[ce,learns]"], "trainable parameters of its own"),
    ],
)
def test_wrong_request_is_one_line_and_leaves_nothing(
    arguments: list[str], problem: str, audit: Audit, tmp_path: Path
) -> None:
    code, output, errors = audit(*arguments)
    assert (code, output) == (ExitCode.USAGE, "")
    assert problem in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unsuitable_folder_is_refused(audit: Audit, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "request.yaml").write_text("{}\n")
    (tmp_path / "file").write_text("")
    for name, problem in (("trial", "holds a trial"), ("file", "cannot write to")):
        code, _, errors = audit("loss=[ce,nll]", f"hydra.run.dir={tmp_path / name}")
        assert code == ExitCode.USAGE
        assert problem in errors
        assert errors.count("\n") == 1
    assert [path.name for path in (tmp_path / "trial").iterdir()] == ["request.yaml"]
