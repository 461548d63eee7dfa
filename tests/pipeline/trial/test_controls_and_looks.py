"""Controls that a trial trains beside its losses, and interim looks at a growing number of seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.entry import ExitCode
from tests.trials import comparisons, hashes, trial, verdict


def control_arms(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path / "controls").iterdir())


def cross_entropy(smoothing: str) -> str:
    """Return the override that adds cross-entropy with this label smoothing."""
    fn = f"{{_target_: torch.nn.CrossEntropyLoss, label_smoothing: {smoothing}}}"
    return f"+loss.smoothed={{fn: {fn}, args: [logits, labels]}}"


def test_a_reference_alone_has_controls_if_requested(tmp_path: Path) -> None:
    trial(tmp_path / "t", "protocol.controls=all", "loss=[ce]", "seed=[0,1]")
    assert verdict(tmp_path / "t")["comparisons"] == []
    assert set(verdict(tmp_path / "t")["controls"]["outcomes"]) == {"placebo_float64", "placebo_reordered", "dose"}


def test_controls_are_kept_apart_and_move_no_bit(tmp_path: Path) -> None:
    path, request = tmp_path / "t", ("loss=[ce,nll_softmax]", "seed=[0,1,2]")
    trial(path, "protocol.controls=all", *request)
    assert control_arms(path) == ["dose", "placebo_float64", "placebo_reordered", "replay"]
    assert [folder.name for folder in (path / "controls" / "replay").iterdir()] == ["s0"]
    assert sorted(folder.name for folder in (path / "cells").iterdir()) == ["ce", "nll_softmax"]
    assert verdict(path)["controls"]["replay"] == {"seed": 0, "bitwise": True}
    assert set(verdict(path)["controls"]["outcomes"]) == {"dose", "placebo_float64", "placebo_reordered"}
    (entry,) = verdict(path)["comparisons"]
    assert entry["envelope"]["word"] == "inside"
    assert set(entry["assay_sensitivity"]) == {"placebo_equivalent", "dose_different", "holds"}
    trial(tmp_path / "without", "protocol.controls=none", *request)
    assert hashes(tmp_path / "without").items() <= hashes(path).items()


def test_a_difference_too_small_for_metrics_leaves_the_envelope(tmp_path: Path) -> None:
    trial(tmp_path / "t", "protocol.controls=all", "loss=[ce]", cross_entropy("1e-5"), "seed=[0,1,2,3,4]")
    (entry,) = verdict(tmp_path / "t")["comparisons"]
    assert entry["envelope"]["word"] == "outside"
    assert entry["outcome"] == "inconclusive"


def test_where_every_loss_is_identical_a_replay_is_enough(tmp_path: Path) -> None:
    trial(tmp_path / "t", "audit=true", "protocol.controls=auto", "loss=[ce,nll]", "seed=[0,1]")
    assert control_arms(tmp_path / "t") == ["replay"]


def test_a_loss_that_is_nan_at_once_is_outside_the_envelope(tmp_path: Path) -> None:
    trial(tmp_path / "t", "protocol.controls=all", "loss=[ce,kl_literal]", "seed=[0,1]")
    (entry,) = verdict(tmp_path / "t")["comparisons"]
    assert entry["envelope"] == {
        "word": "outside",
        "excess": {"1": None, "3": None, "10": None},
        "reason": "it diverges by step 1 in most seeds",
        "smallest": None,
    }
    assert [failure["cause"] for failure in entry["failures"]] == ["the objective is not finite"] * 2


# --- looks


def test_another_number_of_seeds_is_another_look(tmp_path: Path) -> None:
    """The second look has half the level of the first."""
    request = ("loss=[ce,nll_softmax]", "expect=null")
    trial(tmp_path / "t", *request, "seed=[0,1,2]")
    protocol = verdict(tmp_path / "t")["protocol"]
    assert (protocol["look"], protocol["looks"], protocol["level"]) == (1, 1, 0.05)
    trial(tmp_path / "t", *request, "seed=[0,1,2,3]")
    assert verdict(tmp_path / "t")["protocol"]["level"] == 0.025
    assert comparisons(tmp_path / "t")["nll_softmax"]["metrics"]["nll"]["level"] == 0.025


def test_the_looks_declared_first_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial(tmp_path / "t", "loss=[ce,brier]", "seed=[0,1]")
    assert "as declared by the first verdict" not in capsys.readouterr().out
    declared = verdict(tmp_path / "t")["protocol"]
    trial(tmp_path / "t", "loss=[ce,brier]", "seed=[0,1]", "protocol.looks=3", "protocol.max_seeds=100")
    assert "using alpha=0.05 and looks=1, as declared by the first verdict in" in capsys.readouterr().out
    assert verdict(tmp_path / "t")["protocol"] == declared


def test_max_seeds_trains_the_advised_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five seeds are too few for equivalence; ten are advised, and ten decide."""
    path = tmp_path / "t"
    request = (
        "loss=[ce,nll_softmax]",
        "seed=[0,1,2,3,7]",
        "protocol.looks=2",
        "protocol.max_seeds=40",
        "about=outcome",
    )
    assert trial(path, *request, "expect=equivalent") == ExitCode.HOLDS
    assert "undecided: continuing with 10 seeds" in capsys.readouterr().out
    assert verdict(path)["seeds"] == [0, 1, 2, 3, 7, 4, 5, 6, 8, 9]
    assert verdict(path)["protocol"]["look"] == 2
    looks = [json.loads(line) for line in (path / "looks.jsonl").read_text().splitlines()]
    assert [(look["words"], look["level"]) for look in looks] == [
        ({"nll_softmax": "inconclusive"}, 0.025), ({"nll_softmax": "equivalent"}, 0.025),
    ]  # fmt: skip
    assert trial(path, *request) == ExitCode.HOLDS  # the same command again trains nothing and looks no third time
    assert len((path / "looks.jsonl").read_text().splitlines()) == 2


def test_growth_ends_at_max_seeds(tmp_path: Path) -> None:
    request = ("loss=[ce,brier]", "seed=[0,1]", "protocol.looks=3", "protocol.max_seeds=4", "about=outcome")
    trial(tmp_path / "t", *request)
    assert len(verdict(tmp_path / "t")["seeds"]) <= 4
