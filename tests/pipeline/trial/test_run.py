"""Whole trials, from configuration to exit code."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from likelihood_lab.errors import UsageError
from likelihood_lab.stats.pairs import measured_in
from pipeline.config import schema as conf
from pipeline.entry import ExitCode
from pipeline.models import mlp
from pipeline.replica import Replica
from pipeline.storage.cells import Cell, TrialFolder
from pipeline.trial import audit_step as objective_axis
from pipeline.trial.run import run
from tests.trials import FAST, compose, same_bits, trial, verdict, weights, words

ALL_LOSSES = sorted(path.stem for path in (conf.CONF / "loss").glob("*.yaml"))
CONTROLS = ("kl_mean", "reverse_kl", "brier", "label_smoothing", "double_softmax", "nll_on_probs")


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NLL, CE and KL over three seeds."""
    path = tmp_path_factory.mktemp("main") / "trial"
    code = trial(path, "loss=[nll,ce,kl]", "seed=[0,1,2]", "expect={nll: identical, kl: same}")
    assert code == ExitCode.HOLDS
    return path


def test_nll_ce_and_kl_train_the_same_model_bit_for_bit(main_job: Path) -> None:
    assert words(main_job) == {"nll": "identical", "kl": "identical"}
    assert same_bits(weights(main_job, "nll", 1), weights(main_job, "ce", 1))
    assert not same_bits(weights(main_job, "ce", 0), weights(main_job, "ce", 1))


def test_the_folder_holds_what_the_contract_says(main_job: Path) -> None:
    for arm in ("nll", "ce", "kl"):
        for seed in range(3):
            cell = main_job / "cells" / arm / f"s{seed}"
            assert sorted(file.name for file in cell.iterdir()) == [
                "config.yaml",
                "history.parquet",
                "state.pt",
            ]
    assert {"verdict.json", "report.html", "figures", "checkpoints", "history.parquet"} <= {
        entry.name for entry in main_job.iterdir()
    }
    report = (main_job / "report.html").read_text()
    assert "identical" in report
    assert "the command" in report


def test_a_checkpoint_loads_into_the_plain_model(main_job: Path) -> None:
    state = torch.load(main_job / "checkpoints" / "kl" / "s2.pt", weights_only=True)
    model = mlp((1, 8, 8), 10, hidden=[16])
    model.load_state_dict(state, strict=True)
    assert same_bits(dict(model.state_dict()), weights(main_job, "kl", 2))


def test_a_history_holds_the_frozen_list_of_metrics(main_job: Path) -> None:
    history = pd.read_parquet(main_job / "cells" / "ce" / "s0" / "history.parquet")
    metrics = {f"{split}/{name}" for split in ("train", "val", "test") for name in measured_in([])}
    assert set(history["metric"]) == metrics | {"train/objective"}
    assert history[history["metric"] == "val/nll"]["step"].tolist() == [18, 36]


def test_an_expectation_that_fails_is_exit_code_1(main_job: Path) -> None:
    before = (main_job / "cells" / "ce" / "s0" / "state.pt").stat().st_mtime_ns
    expect = "expect={nll: different}"
    assert trial(main_job, "loss=[nll,ce,kl]", "seed=[0,1,2]", expect) == ExitCode.REFUTED
    assert (main_job / "cells" / "ce" / "s0" / "state.pt").stat().st_mtime_ns == before, "nothing was left to train"


def test_more_seeds_train_only_the_new_ones_to_the_bits_of_a_trial_of_all(tmp_path: Path) -> None:
    trial(tmp_path / "grown", "loss=[ce,kl]", "seed=[0,1]")
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "grown" / "cells").glob("*/*/state.pt")}
    trial(tmp_path / "grown", "loss=[ce,kl,brier]", "seed=[0,1,5]")
    assert {file: file.stat().st_mtime_ns for file in first} == first
    trial(tmp_path / "whole", "loss=[ce,kl,brier]", "seed=[0,1,5]")
    for arm in ("ce", "kl", "brier"):
        for seed in (0, 1, 5):
            assert same_bits(weights(tmp_path / "grown", arm, seed), weights(tmp_path / "whole", arm, seed))
    assert words(tmp_path / "grown") == words(tmp_path / "whole")


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_killed_after_any_cell_the_same_command_trains_only_the_rest(
    kept: int, main_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = TrialFolder.write, iter(range(100))

    def dying(self: TrialFolder, *args: Any) -> Cell:
        if next(calls) == kept:
            raise KeyboardInterrupt
        return write(self, *args)

    request = ("loss=[nll,ce,kl]", "seed=[0,1,2]", "expect=same")
    monkeypatch.setattr(TrialFolder, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        trial(tmp_path / "trial", *request)
    monkeypatch.setattr(TrialFolder, "write", write)
    survivors = {file: file.stat().st_mtime_ns for file in (tmp_path / "trial" / "cells").glob("*/*/state.pt")}
    assert len(survivors) == kept
    assert trial(tmp_path / "trial", *request) == ExitCode.HOLDS
    assert {file: file.stat().st_mtime_ns for file in survivors} == survivors
    for arm in ("nll", "ce", "kl"):
        assert same_bits(weights(tmp_path / "trial", arm, 2), weights(main_job, arm, 2))


def test_a_half_written_cell_is_trained_again(tmp_path: Path) -> None:
    request = ("loss=[ce]", "seed=[0,1]")
    trial(tmp_path / "t", *request)
    before = weights(tmp_path / "t", "ce", 1)
    (tmp_path / "t" / "cells" / "ce" / "s1" / "state.pt").unlink()
    trial(tmp_path / "t", *request)
    assert same_bits(weights(tmp_path / "t", "ce", 1), before)


def test_cells_of_other_code_move_aside_and_are_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial(tmp_path / "t", "loss=[ce,brier]")
    monkeypatch.setattr("pipeline.trial.setup.ENGINE_VERSION", 0)
    trial(tmp_path / "t", "loss=[ce,brier]")
    assert len(list((tmp_path / "t" / "stale").glob("*/*/state.pt"))) == 2
    assert "trained again: ce/s0, brier/s0" in capsys.readouterr().out


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    trial(tmp_path / "t", "loss=[ce]")
    with pytest.raises(UsageError, match=r"another .*epochs.*hydra\.run\.dir"):
        trial(tmp_path / "t", "loss=[ce]", "epochs=3")


def test_a_single_run_without_comparison_asserts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trial(tmp_path / "t", "loss=[brier]") == ExitCode.HOLDS
    assert "nothing was asserted" in capsys.readouterr().out
    assert verdict(tmp_path / "t")["reference"] == "brier"


def diverges_at_once_beside(path: Path) -> None:
    entries = {entry["loss"]: entry for entry in verdict(path)["comparisons"]}
    for name in ("kl_literal", "likelihood_product"):
        assert {f["step"] for f in entries[name]["failures"]} == {1}
        assert [f["seed"] for f in entries[name]["failures"]] == verdict(path)["seeds"]
        assert entries[name]["verdict"] in ("different", "inconclusive")  # two seeds are too few to be sure


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides the total loss")  # torch warns of kl_mean, rightly
def test_all_losses_side_by_side(tmp_path: Path) -> None:
    trial(tmp_path / "all", f"loss=[{','.join(ALL_LOSSES)}]", "seed=[0,1]")
    diverges_at_once_beside(tmp_path / "all")
    found = words(tmp_path / "all")
    assert {name for name, word in found.items() if word == "identical"} == {"nll", "kl", "ce_one_hot", "ce_soft"}
    assert not {found[name] for name in CONTROLS} & {"identical", "equivalent"}
    without = [name for name in ALL_LOSSES if name not in ("kl_literal", "likelihood_product")]
    trial(tmp_path / "finite", f"loss=[{','.join(without)}]", "seed=[0,1]")
    for name in without:
        for seed in (0, 1):
            assert same_bits(weights(tmp_path / "all", name, seed), weights(tmp_path / "finite", name, seed)), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:reduction. .mean. divides the total loss")
def test_the_textbook_experiment_calls_no_control_the_same(tmp_path: Path) -> None:
    request = ("experiment=textbook_spellings", "epochs=30", "model.hidden=[128]")
    trial(tmp_path / "t", *request)
    diverges_at_once_beside(tmp_path / "t")
    found = words(tmp_path / "t")
    assert {found[name] for name in CONTROLS} <= {"different", "inconclusive"}
    assert found["kl_literal"] == found["likelihood_product"] == "different"
    assert found["nll"] == found["kl"] == "identical"


def test_the_cnn_trains_in_the_loop_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(_cnn_config(), tmp_path / "t", "x")
    assert code == ExitCode.HOLDS
    assert "engine loop (convolutions on a CPU gain nothing from folding)" in capsys.readouterr().out
    assert words(tmp_path / "t") == {"nll": "identical"}


def _cnn_config() -> dict[str, Any]:
    config = compose("loss=[nll,ce]", "epochs=1")
    return config | {"model": {"_target_": "pipeline.models.cnn", "channels": [4], "hidden": 8}}


TELLING_ITS_PEAK = """
import atexit, pathlib, re
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: pathlib.Path("{}").write_text(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]))
from pipeline.train import main
main()
"""


def _photographs(root: Path, draw: Callable[..., Any]) -> None:
    from PIL import Image

    for label, name in enumerate(("cat", "dog", "other")):
        for part, count in (("train", 9), ("test", 4)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = draw(200, 420), draw(200, 420)
                pixels = np.full((height, width, 3), 40 * label, dtype=np.uint8)
                pixels[draw(0, 90) : draw(100, 190), draw(0, 90) : draw(100, 190), label] = 220
                Image.fromarray(pixels).save(folder / f"{i}.jpg")


def test_a_folder_of_pictures_trains_resnet18_at_256_pixels_below_2_gigabytes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    _photographs(tmp_path / "pictures", lambda low, high: int(generator.integers(low, high)))
    command = [
        sys.executable, "-c", TELLING_ITS_PEAK.format(tmp_path / "peak"), "dataset=image_folder",
        f"dataset.root={tmp_path / 'pictures'}",
        f"dataset.cache={tmp_path / 'cache'}", "model=resnet18", "loss=[nll,ce,kl]", "epochs=1", "batch_size=4",
        "controls=none",
        "tracking=none", "trainer=cpu", "optimizer.lr=0.01", "expect=identical", f"hydra.run.dir={tmp_path / 'trial'}",
    ]  # fmt: skip
    done = subprocess.run(command, check=False)
    assert done.returncode == ExitCode.HOLDS
    peak = int((tmp_path / "peak").read_text()) / 2**20  # of that process alone, in GB
    assert peak < 2, f"{peak:.2f} GB"
    assert words(tmp_path / "trial") == {"nll": "identical", "kl": "identical"}


def test_every_cell_and_the_report_are_runs_in_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    request = ("tracking=mlflow", f"tracking.uri={uri}", "loss=[ce,brier]", "seed=[0,7]")
    trial(tmp_path / "t", *request)
    trial(tmp_path / "t", *request)  # nothing is recorded twice
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("likelihood-lab").experiment_id])
    trained = {run.info.run_name: run for run in runs if run.data.tags["kind"] == "train"}
    assert sorted(trained) == ["brier/s0", "brier/s7", "ce/s0", "ce/s7"]
    assert len(runs) == 5
    tags = trained["brier/s7"].data.tags
    expected = {"loss": "brier", "seed": "7", "model": "mlp", "dataset": "digits", "sweep": "t"}
    assert expected.items() <= tags.items()
    assert {"fingerprint", "weights.sha256", "engine"} <= set(tags)
    metrics = trained["brier/s7"].data.metrics
    assert {"train/objective", "val/nll", "test/accuracy", "gap/parameters"} <= set(metrics)
    assert trained["ce/s0"].data.metrics["gap/parameters"] == 0
    assert trained["brier/s0"].data.params["loss"] == "brier"


def smoothing_in_place(log_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
    """Label smoothing that overwrites the targets that it was handed."""
    target_probs.mul_(0.7).add_(0.03)
    return torch.nn.functional.kl_div(log_probs, target_probs, reduction="batchmean")


def raising_on_short_batches(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if 10 < len(labels) < 64:
        raise ValueError(f"cannot do {len(labels)}")
    return torch.nn.functional.cross_entropy(logits, labels)


def with_loss(function: str, args: list[str], *overrides: str) -> dict[str, Any]:
    config = compose("loss=[ce]", "reference=ce", *overrides)
    declared = {"fn": {"_target_": f"{__name__}.{function}", "_partial_": True}, "args": args}
    return config | {"loss": config["loss"] | {"mine": declared}}


def test_a_fast_path_that_is_switched_off_changes_no_bit(tmp_path: Path) -> None:
    asked = ("loss=[ce,kl]", "seed=[0,1]", "model=mlp")
    trial(tmp_path / "fast", *asked)
    trial(tmp_path / "plain", *asked, "trainer.fast=false")
    for arm, seed in itertools.product(("ce", "kl"), (0, 1)):
        cells = [TrialFolder(tmp_path / folder).read(Replica(arm, seed)) for folder in ("fast", "plain")]
        assert all(cells)
        assert len({cell.record.weights_sha256 for cell in cells if cell}) == 1
        assert len({cell.record.fingerprint for cell in cells if cell}) == 1


def test_cells_of_a_cnn_say_that_their_channels_are_last(tmp_path: Path) -> None:
    asked = ("loss=[ce]", "seed=0", "epochs=1", "model=cnn", "model.channels=[4]", "model.hidden=8", "~model.dropout")
    trial(tmp_path / "t", *asked)
    first = TrialFolder(tmp_path / "t").read(Replica("ce", 0))
    assert first is not None
    assert first.record.made_from["engine"]["memory_format"] == "channels_last"
    trial(tmp_path / "t", *asked, "trainer.fast=false")
    again = TrialFolder(tmp_path / "t").read(Replica("ce", 0))
    assert again is not None
    assert "memory_format" not in again.record.made_from["engine"]
    assert again.record.fingerprint != first.record.fingerprint


def test_a_loss_that_overwrites_what_others_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="overwrites its input target_probs"):
        run(with_loss("smoothing_in_place", ["log_probs", "target_probs"]), tmp_path / "t", "x")


def test_a_loss_that_raises_in_training_is_a_failed_run_beside_sound_ones(main_job: Path, tmp_path: Path) -> None:
    run(with_loss("raising_on_short_batches", ["logits", "labels"], "seed=[0,1]"), tmp_path / "t", "x")
    (entry,) = verdict(tmp_path / "t")["comparisons"]
    assert {(f["step"], f["cause"]) for f in entry["failures"]} == {(18, "the loss raised ValueError: cannot do 49")}
    assert same_bits(weights(tmp_path / "t", "ce", 1), weights(main_job, "ce", 1))


def test_a_progress_bar_changes_nothing(main_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("pipeline.trial.run.console", Console(file=screen, force_terminal=True))
    trial(tmp_path / "t", "loss=[ce]", "seed=[0,1]")
    assert same_bits(weights(tmp_path / "t", "ce", 1), weights(main_job, "ce", 1))
    assert "val/nll ce" in screen.getvalue()


def test_a_long_training_says_once_and_early_what_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.trial.progress.PROBE", 0.0)
    monkeypatch.setattr("pipeline.trial.progress.LONG", 0.0)
    trial(tmp_path / "t", "loss=[ce]", "seed=[0,1]", "trainer.tile=1")
    assert capsys.readouterr().out.count("to train 2 runs, if they go on") == 1


def test_models_that_never_moved_are_not_called_the_same(tmp_path: Path) -> None:
    code = trial(tmp_path / "t", "loss=[ce,brier]", "optimizer.lr=0", "expect=same")
    assert code == ExitCode.REFUTED
    (entry,) = verdict(tmp_path / "t")["comparisons"]
    assert entry["verdict"] == "inconclusive"
    assert "never moved" in entry["sentence"]


# --- the audit in a trial


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of losses that are, and are not, the same function as cross-entropy."""
    path = tmp_path_factory.mktemp("audited") / "trial"
    expect = "expect={nll: same, nll_softmax: rounding, kl_mean: scaled}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reduction: 'mean' divides")  # that torch will change it some day
        assert trial(path, "audit=true", "loss=[ce,nll,nll_softmax,kl_mean]", "seed=[0,1]", expect) == ExitCode.HOLDS
    return path


def test_a_trial_asks_first_whether_the_losses_are_the_same_function(audited: Path) -> None:
    found = {entry["loss"]: entry for entry in verdict(audited)["comparisons"]}
    assert {name: entry["objective"] for name, entry in found.items()} == {
        "nll": "identical", "nll_softmax": "rounding", "kl_mean": "scaled",
    }  # fmt: skip
    assert {name: entry["verdict"] for name, entry in found.items()} == {
        "nll": "identical", "nll_softmax": "rounding", "kl_mean": "different",
    }  # fmt: skip
    assert found["kl_mean"]["scale"]["formula"] == "1/C"
    assert found["kl_mean"]["sentence"].startswith("A multiple of the same function: k = 1/C in every batch")
    assert "label smoothing" in found["nll"]["would_have_caught"]
    assert found["nll_softmax"]["domain"]["axis"] == "gap"


def test_what_the_audit_knows_is_not_asked_again(
    audited: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((audited / "audit.json").read_text())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "reduction: 'mean' divides")
        trial(audited, "audit=true", "loss=[ce,nll,nll_softmax,kl_mean,brier]", "seed=[0,1]")
    assert "auditing brier against ce" in capsys.readouterr().out
    after = json.loads((audited / "audit.json").read_text())
    assert after["losses"].pop("brier")["objective"] == "different"
    assert after == before


def test_the_trials_of_a_sweep_audit_their_losses_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    audit = objective_axis.audit_losses
    monkeypatch.setattr(objective_axis, "audit_losses", lambda *given: asked.append(given) or audit(*given))
    monkeypatch.setattr(objective_axis, "_known", {})
    for name, epochs in (("one", 1), ("another", 2)):
        trial(tmp_path / name, "loss=[ce,nll]", "audit=true", f"epochs={epochs}")
    assert len(asked) == 1
    both = [json.loads((tmp_path / name / "audit.json").read_text()) for name in ("one", "another")]
    of_weights = [entry.pop("at_weights") for audit in both for entry in audit["losses"].values()]
    assert both[0] == both[1]
    assert of_weights[0]["about"] != of_weights[1]["about"]
    trial(tmp_path / "third", "loss=[ce,brier]", "audit=true")
    assert len(asked) == 2


def test_an_audit_of_other_code_or_another_reference_says_nothing(audited: Path) -> None:
    from pipeline.verdict.audit_entry import Audit, entry_in_force
    from pipeline.verdict.outcomes import TrialResults
    from pipeline.verdict.plan import Look, read_plan

    folder = TrialFolder(audited)
    cells = {Replica(cell.record.arm, cell.record.seed): cell for cell in folder.cells()}
    results = TrialResults(cells, *read_plan(audited), Look(1, 0.05))

    def holds(name: str, **changes: Any) -> bool:
        return entry_in_force(name, Audit.from_json(audit | changes), results) is not None

    audit = json.loads((audited / "audit.json").read_text())
    assert holds("nll")
    audit["losses"]["nll"]["made_from"]["loss_code"] = "other"
    assert not holds("nll")
    assert holds("kl_mean")
    assert not holds("kl_mean", reference="nll")
    audit["reference_made_from"]["torch"] = "1.0"
    assert not holds("kl_mean")


def test_without_an_audit_the_verdict_says_so(main_job: Path) -> None:
    assert not (main_job / "audit.json").exists()
    (found, _) = verdict(main_job)["comparisons"]
    assert found["objective"] == "not_run"
    assert "were not audited" in found["sentence"]


# --- looks


def test_another_number_of_seeds_is_another_look_at_half_the_level(tmp_path: Path) -> None:
    request = ("loss=[ce,nll_softmax]", "expect=null")
    trial(tmp_path / "t", *request, "seed=[0,1,2]")
    assert {key: verdict(tmp_path / "t")["protocol"][key] for key in ("look", "looks", "level")} == {
        "look": 1, "looks": 1, "level": 0.05,
    }  # fmt: skip
    trial(tmp_path / "t", *request, "seed=[0,1,2,3]")
    assert verdict(tmp_path / "t")["protocol"]["level"] == 0.025
    (found,) = verdict(tmp_path / "t")["comparisons"]
    assert found["metrics"]["nll"]["level"] == 0.025


def test_looks_that_were_declared_first_hold_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial(tmp_path / "t", "loss=[ce,brier]", "seed=[0,1]")
    assert "as declared by the first verdict" not in capsys.readouterr().out
    declared = verdict(tmp_path / "t")["protocol"]
    trial(tmp_path / "t", "loss=[ce,brier]", "seed=[0,1]", "looks=3", "until=decided")
    assert "using alpha=0.05 and looks=1, as declared by the first verdict in" in capsys.readouterr().out
    assert verdict(tmp_path / "t")["protocol"] == declared


def test_until_decided_goes_on_with_the_seeds_that_the_verdict_advised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too few seeds for equivalence at first; ten are advised, and ten decide."""
    path = tmp_path / "t"
    request = ("loss=[ce,nll_softmax]", "seed=[0,1,2,3,7]", "looks=2", "until=decided", "about=outcome")
    assert trial(path, *request, "expect=equivalent") == ExitCode.HOLDS
    assert "undecided: going on to 10 seeds" in capsys.readouterr().out
    assert verdict(path)["seeds"] == [0, 1, 2, 3, 7, 4, 5, 6, 8, 9]
    assert verdict(path)["protocol"]["look"] == 2
    looks = [json.loads(line) for line in (path / "looks.jsonl").read_text().splitlines()]
    assert [(entry["words"], entry["level"]) for entry in looks] == [
        ({"nll_softmax": "inconclusive"}, 0.025), ({"nll_softmax": "equivalent"}, 0.025),
    ]  # fmt: skip
    assert trial(path, *request) == ExitCode.HOLDS  # the same command again: nothing to train, the same two looks
    assert len((path / "looks.jsonl").read_text().splitlines()) == 2


def test_until_decided_ends_at_the_most_seeds(tmp_path: Path) -> None:
    request = ("loss=[ce,brier]", "seed=[0,1]", "looks=3", "until=decided", "max_seeds=4", "about=outcome")
    trial(tmp_path / "t", *request)
    assert len(verdict(tmp_path / "t")["seeds"]) <= 4


def test_an_edited_cell_is_named_by_the_report_and_trained_again(tmp_path: Path) -> None:
    from pipeline.report import report

    path = tmp_path / "t"
    trial(path, "loss=[ce,nll]", "seed=[0,1]")
    edited = path / "cells" / "nll" / "s1" / "history.parquet"
    frame = pd.read_parquet(edited)
    frame.loc[frame["metric"] == "test/nll", "value"] = 0.001
    frame.to_parquet(edited, index=False)
    report([str(path)])
    (found,) = verdict(path)["comparisons"]
    assert (found["outcome"], found["failures"][0]["seed"]) == ("inconclusive", 1)
    assert found["failures"][0]["cause"] == "damaged, history.parquet is not as it was written; train it again"
    trial(path, "loss=[ce,nll]", "seed=[0,1]")
    assert words(path) == {"nll": "identical"}
    assert list((path / "stale" / "nll").iterdir())


def test_a_cell_that_was_copied_from_another_arm_is_no_result_of_this_one(tmp_path: Path) -> None:
    from pipeline.report import report

    path = tmp_path / "t"
    trial(path, "loss=[ce,brier]", "seed=[0,1]")
    shutil.rmtree(path / "cells" / "brier" / "s1")
    shutil.copytree(path / "cells" / "ce" / "s1", path / "cells" / "brier" / "s1")
    report([str(path)])
    (found,) = verdict(path)["comparisons"]
    assert (found["outcome"], found["failures"][0]["seed"]) == ("inconclusive", 1)
    trial(path, "loss=[ce,brier]", "seed=[0,1]")
    assert verdict(path)["comparisons"][0]["failures"] == []


def test_a_cell_of_a_longer_training_is_a_hole_and_no_traceback(tmp_path: Path) -> None:
    from pipeline.report import report

    trial(tmp_path / "t", "loss=[ce,brier]", "seed=[0,1]")
    trial(tmp_path / "longer", "loss=[ce]", "seed=[1]", "epochs=4")
    shutil.rmtree(tmp_path / "t" / "cells" / "ce" / "s1")
    shutil.copytree(tmp_path / "longer" / "cells" / "ce" / "s1", tmp_path / "t" / "cells" / "ce" / "s1")
    report([str(tmp_path / "t")])
    assert "the pairs were not made alike: epochs" in verdict(tmp_path / "t")["comparisons"][0]["sentence"]


def test_the_first_screen_of_a_real_report_says_what_was_and_what_was_not_tested(tmp_path: Path) -> None:
    from pipeline.report import report

    trial(tmp_path / "t", "loss=[ce,nll,brier]", "seed=[0]", "audit=true", "controls=all")
    page = (tmp_path / "t" / "report.html").read_text()
    assert "In the losses themselves: label smoothing by" in page
    assert "margin that the placebos pass" not in page  # one seed shows no placebo equal
    report([str(tmp_path / "t"), "reference=nll"])
    page = (tmp_path / "t" / "report.html").read_text()
    assert "In the losses themselves: unknown, they were not audited." in page
    assert "How far gradients are" not in page  # they were measured from another reference


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # kl_mean's very point
def test_a_factor_in_the_loss_is_undone_by_one_in_its_rate(tmp_path: Path) -> None:
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


# --- controls


def test_the_reference_alone_has_controls_where_they_are_asked_for(tmp_path: Path) -> None:
    trial(tmp_path / "t", "controls=all", "loss=[ce]", "seed=[0,1]")
    assert verdict(tmp_path / "t")["comparisons"] == []
    assert set(verdict(tmp_path / "t")["controls"]["outcomes"]) == {"placebo_float64", "placebo_reordered", "dose"}


def test_controls_are_trained_beside_the_losses_and_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "t"
    trial(path, "controls=all", "loss=[ce,nll_softmax]", "seed=[0,1,2]")
    assert sorted(folder.name for folder in (path / "controls").iterdir()) == [
        "dose", "placebo_float64", "placebo_reordered", "replay",
    ]  # fmt: skip
    assert [folder.name for folder in (path / "controls" / "replay").iterdir()] == ["s0"]
    assert sorted(folder.name for folder in (path / "cells").iterdir()) == ["ce", "nll_softmax"]
    found = verdict(path)
    assert found["controls"]["replay"] == {"seed": 0, "bitwise": True}
    assert set(found["controls"]["outcomes"]) == {"dose", "placebo_float64", "placebo_reordered"}
    (comparison,) = found["comparisons"]
    assert comparison["envelope"]["word"] == "inside"
    assert set(comparison["assay_sensitivity"]) == {"placebo_equivalent", "dose_different", "holds"}


def test_a_mutant_too_small_for_any_metric_parts_faster_than_rounding(tmp_path: Path) -> None:
    smoothed = "{fn: {_target_: torch.nn.CrossEntropyLoss, label_smoothing: 1e-5}, args: [logits, labels]}"
    trial(tmp_path / "t", "controls=all", "loss=[ce]", f"+loss.smoothed={smoothed}", "seed=[0,1,2,3,4]")
    (found,) = verdict(tmp_path / "t")["comparisons"]
    assert found["envelope"]["word"] == "outside"
    assert found["outcome"] == "inconclusive"


def test_a_control_s_bits_do_not_move_its_neighbours(tmp_path: Path) -> None:
    trial(tmp_path / "with", "controls=all", "loss=[ce,nll_softmax]", "seed=[0,1]")
    trial(tmp_path / "without", "controls=none", "loss=[ce,nll_softmax]", "seed=[0,1]")
    for arm in ("ce", "nll_softmax"):
        assert same_bits(weights(tmp_path / "with", arm, 1), weights(tmp_path / "without", arm, 1))


def test_where_every_loss_is_identical_a_replay_is_enough(tmp_path: Path) -> None:
    trial(tmp_path / "t", "audit=true", "controls=auto", "loss=[ce,nll]", "seed=[0,1]")
    assert [folder.name for folder in (tmp_path / "t" / "controls").iterdir()] == ["replay"]


def test_the_losses_are_asked_again_at_what_reached_them_in_training(tmp_path: Path) -> None:
    trial(tmp_path / "t", "audit=true", "loss=[ce,nll]", "seed=[0]")
    audit = json.loads((tmp_path / "t" / "audit.json").read_text())
    at = audit["losses"]["nll"]["at_weights"]
    assert at["objective"] == "identical"
    assert at["about"]["steps"] == [1, 9, 18, 36]
    assert "8 of 8 batches" in at["sentence"]  # four moments in two precisions, and no grid
    (found,) = verdict(tmp_path / "t")["comparisons"]
    assert "the reference's own logits at steps 1, 9, 18, 36 (seed 0)" in found["covered"]


def test_what_is_wrong_at_the_trial_s_own_weights_decides() -> None:
    from pipeline.verdict.audit_entry import AuditEntry, with_weights

    at = AuditEntry("different", "wrong there", about={"steps": [1, 9], "seed": 0})
    entry = AuditEntry("identical", "bit for bit", at_weights=at)
    found = with_weights(entry)
    assert found.objective == "different"
    assert found.sentence == "the same function on the grid, but not at this trial's own weights: wrong there"
    for word in ("error", "rounding"):
        assert with_weights(replace(entry, at_weights=replace(at, objective=word))).objective == "identical"


def test_a_loss_that_is_nan_at_once_leaves_a_verdict_that_can_be_read(tmp_path: Path) -> None:
    trial(tmp_path / "t", "controls=all", "loss=[ce,kl_literal]", "seed=[0,1]")
    (found,) = verdict(tmp_path / "t")["comparisons"]
    assert found["envelope"] == {
        "word": "outside",
        "excess": {"1": None, "3": None, "10": None},
        "reason": "it diverges by step 1 in most seeds",
        "smallest": None,
    }  # fmt: skip
    assert [failure["cause"] for failure in found["failures"]] == ["the objective is not finite"] * 2


def test_the_rank_test_tells_a_small_mutant_from_the_reference_and_an_honest_form_not(tmp_path: Path) -> None:
    smoothed = "{fn: {_target_: torch.nn.CrossEntropyLoss, label_smoothing: 1e-3}, args: [logits, labels]}"
    losses = ("loss=[ce,nll_logsumexp]", f"+loss.smoothed={smoothed}")
    trial(tmp_path / "t", "rank_test=5", *losses, "seed=[0,1,2,3,4]", "epochs=1")
    found = {entry["loss"]: entry for entry in verdict(tmp_path / "t")["comparisons"]}
    assert found["smoothed"]["rank_test"]["p"] < 0.01
    assert "The rank test distinguishes it from dithered copies" in found["smoothed"]["sentence"]
    assert found["nll_logsumexp"]["rank_test"]["p"] > 0.05
    assert "The rank test does not distinguish it from dithered copies" in found["nll_logsumexp"]["sentence"]
    assert sorted(folder.name for folder in (tmp_path / "t" / "controls").iterdir()) == [
        *(f"rank_copy_{k}" for k in range(1, 6)), "rank_of_nll_logsumexp", "rank_of_smoothed",
    ]  # fmt: skip


# --- what the verdict must not let pass


def test_a_trial_in_bfloat16_is_audited_in_it(tmp_path: Path) -> None:
    smoothed_in_bf16 = f"{{fn: {{_target_: {__name__}.smoothed_in_bfloat16, _partial_: true}}, args: [logits, labels]}}"
    request = ("audit=true", "precision=bf16_mixed", "loss=[ce]", f"+loss.sly={smoothed_in_bf16}", "seed=[0,1]")
    trial(tmp_path / "t", *request, "epochs=1")
    (found,) = verdict(tmp_path / "t")["comparisons"]
    assert found["objective"] == "different"
    assert found["sentence"].startswith(
        "A different function: the same function in float32 and float64, but not in bfloat16"
    )
    assert any("bfloat16" in entry for entry in found["covered"])


def smoothed_in_bfloat16(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    smoothing = 0.5 if logits.dtype == torch.bfloat16 else 0.0
    return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)


def test_a_loss_that_diverges_alone_is_never_the_same(tmp_path: Path) -> None:
    """log(softmax) at a rate that drives the logits out of its domain."""
    model = ("model.hidden=[128]", "optimizer.lr=2.5", "epochs=3")
    request = ("audit=true", "loss=[ce,nll_softmax]", "seed=[0,1,2]", *model)
    assert trial(tmp_path / "t", *request, "expect=same") == ExitCode.REFUTED
    (found,) = verdict(tmp_path / "t")["comparisons"]
    assert found["failures"]
    assert found["verdict"] in ("conflict", "different")


def test_with_more_threads_the_audit_still_ends(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "pipeline.train", *FAST, "audit=true", "loss=[ce,nll]", "seed=0", "trainer.threads=2",
        "batch_size=512", f"hydra.run.dir={tmp_path / 't'}",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == ExitCode.HOLDS, done.stderr
    (found,) = verdict(tmp_path / "t")["comparisons"]
    assert found["objective"] == "identical"


def test_a_report_about_another_reference_leaves_the_first_one_s_controls_out(tmp_path: Path) -> None:
    from pipeline.report import report

    trial(tmp_path / "t", "controls=all", "loss=[ce,nll_logsumexp,label_smoothing]", "seed=[0,1]")
    assert verdict(tmp_path / "t")["controls"]["replay"]["bitwise"]
    report([str(tmp_path / "t"), "reference=nll_logsumexp"])
    nothing = {"replay": None, "outcomes": {}, "metrics": {}, "assay_sensitivity": None}
    assert verdict(tmp_path / "t")["controls"] == nothing
    assert "not deterministic" not in str(verdict(tmp_path / "t")["comparisons"])
