"""Whole trials, from configuration to exit code: weights, cells, resuming, engines, failures and recording."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from likelihood_lab.stats.pairs import measured_in
from pipeline.config import schema as conf
from pipeline.entry import ExitCode
from pipeline.models import mlp
from pipeline.replica import Replica
from pipeline.report import report
from pipeline.storage.cells import Cell, CellRecord, TrialFolder
from pipeline.trial.run import run
from tests.laboratory import same_bits
from tests.trials import compose, hashes, trial, usage_error, verdict, weights, words

ALL_LOSSES = sorted(path.stem for path in (conf.CONF / "loss").glob("*.yaml"))
DIVERGING = ("kl_literal", "likelihood_product")
OTHER_FUNCTIONS = ("kl_mean", "reverse_kl", "brier", "label_smoothing", "double_softmax", "nll_on_probs")
REQUEST = ("loss=[nll,ce,kl]", "seed=[0,1,2]")

pytestmark = pytest.mark.filterwarnings("ignore:reduction. .mean. divides the total loss")  # torch warns of kl_mean


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NLL, CE and KL over three seeds."""
    path = tmp_path_factory.mktemp("main") / "trial"
    assert trial(path, *REQUEST, "expect={nll: identical, kl: same}") == ExitCode.HOLDS
    return path


@pytest.fixture
def copied(main_job: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(main_job, tmp_path / "copy"))


def modified(path: Path) -> dict[Path, int]:
    """Return the time of the last write of every cell."""
    return {file: file.stat().st_mtime_ns for file in (path / "cells").glob("*/*/state.pt")}


def record(path: Path, arm: str, seed: int) -> CellRecord:
    cell = TrialFolder(path).read(Replica(arm, seed))
    assert cell is not None
    return cell.record


def test_nll_ce_and_kl_train_the_same_bits(main_job: Path) -> None:
    assert words(main_job) == {"nll": "identical", "kl": "identical"}
    assert same_bits(weights(main_job, "nll", 1), weights(main_job, "ce", 1))
    assert not same_bits(weights(main_job, "ce", 0), weights(main_job, "ce", 1))


def test_contents_of_the_folder(main_job: Path) -> None:
    for arm in ("nll", "ce", "kl"):
        for seed in range(3):
            cell = main_job / "cells" / arm / f"s{seed}"
            assert sorted(file.name for file in cell.iterdir()) == ["config.yaml", "history.parquet", "state.pt"]
    files = {"verdict.json", "report.html", "figures", "checkpoints", "history.parquet"}
    assert files <= {entry.name for entry in main_job.iterdir()}
    page = (main_job / "report.html").read_text()
    assert "identical" in page
    assert "the command" in page


def test_a_checkpoint_loads_into_the_plain_model(main_job: Path) -> None:
    state = torch.load(main_job / "checkpoints" / "kl" / "s2.pt", weights_only=True)
    model = mlp((1, 8, 8), 10, hidden=[16])
    model.load_state_dict(state, strict=True)
    assert same_bits(dict(model.state_dict()), weights(main_job, "kl", 2))


def test_a_history_holds_the_fixed_list_of_metrics(main_job: Path) -> None:
    history = pd.read_parquet(main_job / "cells" / "ce" / "s0" / "history.parquet")
    metrics = {f"{split}/{name}" for split in ("train", "val", "test") for name in measured_in([])}
    assert set(history["metric"]) == metrics | {"train/objective"}
    assert history[history["metric"] == "val/nll"]["step"].tolist() == [18, 36]


def test_without_an_audit_the_verdict_says_so(main_job: Path) -> None:
    assert not (main_job / "audit.json").exists()
    entry, _ = verdict(main_job)["comparisons"]
    assert entry["objective"] == "not_run"
    assert "were not audited" in entry["sentence"]


# --- what is trained, and what is not trained again


def test_a_refuted_expectation_is_exit_code_1(copied: Path) -> None:
    before = modified(copied)
    assert trial(copied, *REQUEST, "expect={nll: different}") == ExitCode.REFUTED
    assert modified(copied) == before, "nothing was left to train"


def test_more_losses_and_seeds_train_only_the_new_runs(copied: Path, tmp_path: Path) -> None:
    """The runs get the bits of a trial of all of them."""
    before, grown = modified(copied), ("loss=[nll,ce,kl,brier]", "seed=[0,1,5]")
    trial(copied, *grown)
    assert before.items() <= modified(copied).items()
    trial(tmp_path / "whole", *grown)
    assert hashes(tmp_path / "whole").items() <= hashes(copied).items()
    assert words(copied) == words(tmp_path / "whole")


def test_an_interrupted_trial_trains_only_the_rest(
    main_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = TrialFolder.write, iter(range(100))

    def interrupted(self: TrialFolder, *args: Any) -> Cell:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(TrialFolder, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trial(tmp_path / "t", *REQUEST, "expect=same")
    before = modified(tmp_path / "t")
    assert len(before) == 5
    assert trial(tmp_path / "t", *REQUEST, "expect=same") == ExitCode.HOLDS
    assert before.items() <= modified(tmp_path / "t").items()
    assert hashes(tmp_path / "t") == hashes(main_job)


def test_cells_of_another_engine_version_are_trained_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.trial.setup.ENGINE_VERSION", 0)
    trial(copied, "loss=[ce,nll]", "seed=[0]")
    assert len(list((copied / "stale").glob("*/*/state.pt"))) == 2
    assert "trained again: ce/s0, nll/s0" in capsys.readouterr().out


def test_a_cell_of_a_longer_training_is_not_paired(copied: Path, tmp_path: Path) -> None:
    trial(tmp_path / "longer", "loss=[ce]", "seed=[1]", "epochs=4")
    shutil.rmtree(copied / "cells" / "ce" / "s1")
    shutil.copytree(tmp_path / "longer" / "cells" / "ce" / "s1", copied / "cells" / "ce" / "s1")
    report([str(copied)])
    assert "the pairs were not made alike: epochs" in verdict(copied)["comparisons"][0]["sentence"]


def test_a_single_run_asserts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trial(tmp_path / "t", "loss=[brier]") == ExitCode.HOLDS
    assert "nothing was asserted" in capsys.readouterr().out
    assert verdict(tmp_path / "t")["reference"] == "brier"


# --- all losses, and losses that fail


def check_diverging(path: Path) -> None:
    entries = {entry["loss"]: entry for entry in verdict(path)["comparisons"]}
    for name in DIVERGING:
        assert {f["step"] for f in entries[name]["failures"]} == {1}
        assert [f["seed"] for f in entries[name]["failures"]] == verdict(path)["seeds"]
        assert entries[name]["verdict"] in ("different", "inconclusive")  # two seeds are too few to be sure


def test_all_losses_side_by_side(tmp_path: Path) -> None:
    """Losses that diverge at once do not change the bits of the others."""
    trial(tmp_path / "all", f"loss=[{','.join(ALL_LOSSES)}]", "seed=[0,1]", "epochs=1")
    check_diverging(tmp_path / "all")
    found = words(tmp_path / "all")
    assert {name for name, word in found.items() if word == "identical"} == {"nll", "kl", "ce_one_hot", "ce_soft"}
    assert not {found[name] for name in OTHER_FUNCTIONS} & {"identical", "equivalent"}
    finite = [name for name in ALL_LOSSES if name not in DIVERGING]
    trial(tmp_path / "finite", f"loss=[{','.join(finite)}]", "seed=[0,1]", "epochs=1")
    assert hashes(tmp_path / "finite").items() <= hashes(tmp_path / "all").items()
    assert len(hashes(tmp_path / "finite")) == 2 * len(finite)


@pytest.mark.slow
def test_the_textbook_experiment_calls_no_other_loss_same(tmp_path: Path) -> None:
    trial(tmp_path / "t", "experiment=textbook_spellings", "epochs=30", "model.hidden=[128]")
    check_diverging(tmp_path / "t")
    found = words(tmp_path / "t")
    assert {found[name] for name in OTHER_FUNCTIONS} <= {"different", "inconclusive"}
    assert found["kl_literal"] == found["likelihood_product"] == "different"
    assert found["nll"] == found["kl"] == "identical"


def smoothing_in_place(log_probs: torch.Tensor, target_probs: torch.Tensor) -> torch.Tensor:
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


def test_a_loss_that_overwrites_shared_inputs_is_refused(tmp_path: Path) -> None:
    config = with_loss("smoothing_in_place", ["log_probs", "target_probs"])
    assert "overwrites its input target_probs" in usage_error(lambda: run(config, tmp_path / "t", "x"))


def test_a_loss_that_raises_in_training_is_a_failed_run(main_job: Path, tmp_path: Path) -> None:
    run(with_loss("raising_on_short_batches", ["logits", "labels"], "seed=[0,1]"), tmp_path / "t", "x")
    (entry,) = verdict(tmp_path / "t")["comparisons"]
    assert {(f["step"], f["cause"]) for f in entry["failures"]} == {(18, "the loss raised ValueError: cannot do 49")}
    assert same_bits(weights(tmp_path / "t", "ce", 1), weights(main_job, "ce", 1))


def test_models_that_never_moved_are_not_the_same(tmp_path: Path) -> None:
    assert trial(tmp_path / "t", "loss=[ce,brier]", "optimizer.lr=0", "expect=same") == ExitCode.REFUTED
    (entry,) = verdict(tmp_path / "t")["comparisons"]
    assert entry["verdict"] == "inconclusive"
    assert "never moved" in entry["sentence"]


# --- engines and models


def test_the_fast_path_changes_no_bit(main_job: Path, tmp_path: Path) -> None:
    trial(tmp_path / "plain", *REQUEST, "trainer.fast=false")
    assert hashes(tmp_path / "plain") == hashes(main_job)
    assert record(tmp_path / "plain", "kl", 1).fingerprint == record(main_job, "kl", 1).fingerprint


def test_a_cnn_trains_in_the_loop_with_channels_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = ("epochs=1", "model=cnn", "model.channels=[4]", "model.hidden=8", "~model.dropout")
    assert trial(tmp_path / "t", "loss=[nll,ce]", *request) == ExitCode.HOLDS
    assert "engine loop (convolutions on a CPU gain nothing from folding)" in capsys.readouterr().out
    assert words(tmp_path / "t") == {"nll": "identical"}
    first = record(tmp_path / "t", "ce", 0)
    assert first.made_from["engine"]["memory_format"] == "channels_last"
    trial(tmp_path / "t", "loss=[ce]", *request, "trainer.fast=false")
    again = record(tmp_path / "t", "ce", 0)
    assert "memory_format" not in again.made_from["engine"]
    assert again.fingerprint != first.fingerprint


def image_folder(folder: Path) -> list[str]:
    """Write a folder of pictures and return the overrides that train on it."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog", "other")):
        for part, count in (("train", 9), ("test", 4)):
            (folder / "pictures" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((*rng.integers(200, 420, size=2), 3), 40 * label, dtype=np.uint8)
                pixels[rng.integers(90) : rng.integers(100, 190), rng.integers(90) : rng.integers(100, 190), label] = (
                    220
                )
                Image.fromarray(pixels).save(folder / "pictures" / part / name / f"{i}.jpg")
    return [
        "dataset=image_folder", f"dataset.root={folder / 'pictures'}", f"dataset.cache={folder / 'cache'}",
        "loss=[nll,ce,kl]", "epochs=1", "batch_size=4", "optimizer.lr=0.01", "expect=identical",
    ]  # fmt: skip


def test_a_cnn_trains_on_an_image_folder(tmp_path: Path) -> None:
    model = ("model=cnn", "model.channels=[4]", "model.hidden=8", "dataset.size=16")
    assert trial(tmp_path / "t", *image_folder(tmp_path), *model) == ExitCode.HOLDS
    assert words(tmp_path / "t") == {"nll": "identical", "kl": "identical"}


# The command, which also writes the most memory that it used.
WRITE_PEAK = """
import atexit, pathlib, re
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: pathlib.Path("{}").write_text(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]))
from pipeline.train import main
main()
"""


@pytest.mark.slow
def test_resnet18_at_256_pixels_needs_below_2_gigabytes(tmp_path: Path) -> None:
    request = [
        *image_folder(tmp_path), "model=resnet18", "protocol.controls=none", "tracking=none", "trainer=cpu",
        f"hydra.run.dir={tmp_path / 'trial'}",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", WRITE_PEAK.format(tmp_path / "peak"), *request], check=False)
    assert done.returncode == ExitCode.HOLDS
    gigabytes = int((tmp_path / "peak").read_text()) / 2**20
    assert gigabytes < 2, f"{gigabytes:.2f} GB"
    assert words(tmp_path / "trial") == {"nll": "identical", "kl": "identical"}


# --- what users see while it trains, and what is recorded


def test_a_progress_bar_changes_nothing(main_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("pipeline.trial.run.console", Console(file=screen, force_terminal=True))
    trial(tmp_path / "t", "loss=[ce]", "seed=[0,1]")
    assert same_bits(weights(tmp_path / "t", "ce", 1), weights(main_job, "ce", 1))
    assert "val/nll ce" in screen.getvalue()


def test_a_long_training_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.trial.progress.PROBE", 0.0)
    monkeypatch.setattr("pipeline.trial.progress.LONG", 0.0)
    trial(tmp_path / "t", "loss=[ce]", "seed=[0,1]", "trainer.tile=1")
    assert capsys.readouterr().out.count("to train 2 runs, at the pace") == 1


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
