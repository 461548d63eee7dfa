"""`python -m likelihood_lab check`: exit codes, one line for a wrong request, JSON and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from likelihood_lab.__main__ import main
from likelihood_lab.categorical.mutants import label_smoothing

LOSSES = """
import os
import torch.nn.functional as F

print("printed at import")
os.system("echo printed by a subprocess")
SCALE = 3

def right(logits, labels):
    print("printed by the loss")
    return F.nll_loss(F.log_softmax(logits, 1), labels)

def wrong(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)

def soft(logits, target_probs):
    return -(target_probs * F.log_softmax(logits, 1)).sum(1).mean()

class Namespace:
    right = staticmethod(right)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    few = {"label smoothing": label_smoothing}  # to measure fewer detection limits
    monkeypatch.setattr("likelihood_lab.audit.sensitivity.MUTANTS", few)
    (tmp_path / "command_losses.py").write_text(LOSSES)
    (tmp_path / "command_broken.py").write_text("1 / 0\n")
    (tmp_path / "command_leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "command_needs.py").write_text("import no_such_library\n")


def test_json_is_strict_and_all_that_is_printed() -> None:
    """Output of the module, its subprocess and the loss goes to the standard error."""
    run = [sys.executable, "-m", "likelihood_lab", "check", "command_losses:right", "--num-classes", "2", "--json"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert found["same"] is True
    assert found["loss"] == "command_losses:right"
    assert found["reference"] == "torch.nn.functional:cross_entropy"
    assert found["side_effects"] == ["prints: printed by the loss"]
    assert found["would_have_caught"]
    assert "printed at import" in done.stderr
    assert "printed by a subprocess" in done.stderr


def test_another_loss_is_exit_code_1_with_reason_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "command_losses:wrong", "--num-classes", "2"]) == 1
    shown = capsys.readouterr().out
    assert "different: not parallel to the reference" in shown
    assert "print(torch.autograd.grad(mine(z, labels), z)" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        "Namespace.right",
        "right --reference command_losses:soft --reference-args logits,target_probs",
        "soft --args logits,target_probs --soft-targets --reference-args logits,target_probs",
        "right --dtype bfloat16",
    ],
)
def test_options_reach_the_audit(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *f"command_losses:{arguments} --num-classes 2".split()]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("command_losses:rigth", "command_losses has no 'rigth' (did you mean 'right'?)"),
        ("command_losses:SCALE", "fn is 3; give a function"),
        ("torch.nn:CrossEntropyLoss", "give a function, or an instance"),
        ("no_such_module:loss", "no module 'no_such_module' here or on PYTHONPATH; check the spelling"),
        ("command_losses", "give MODULE:FUNCTION, such as command_losses:my_loss"),
        ("./command_losses.py:right", "give MODULE:FUNCTION, such as command_losses:right"),
        ("command_broken:loss", "command_broken cannot be imported: ZeroDivisionError"),
        ("command_leaves:loss", "command_leaves cannot be imported: SystemExit"),
        ("command_needs:loss", "command_needs cannot be imported: No module named 'no_such_library'"),
        ("command_losses:right --reference no:where", "no module 'no'"),
        ("command_losses:right --dtype bf16", "--dtype bf16 (did you mean 'bfloat16'?): choose from bfloat16"),
        ("command_losses:right --args logit,labels", "args names 'logit' (did you mean 'logits'?)"),
        ("command_losses:right --num-classes 2,x", "'2,x' is not a list of numbers such as 2,10"),
        ("command_losses:right --num-classes 1", "each at least 2"),
        ("command_losses:right --ignore-index one", "--ignore-index"),
        ("command_losses:right --device nowhere", "device=nowhere cannot be used here"),
        ("command_losses:right --soft-targets", "soft_targets needs target_probs"),
        ("command_losses:right --jsno", "unrecognized arguments: --jsno"),
        ("", "MODULE:FUNCTION"),
    ],
)
def test_wrong_request_is_one_line(arguments: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments.split()]) == 2
    shown = capsys.readouterr().err
    assert text in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
