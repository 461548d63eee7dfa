"""Memory, disk and time of a trial: estimated before it starts; a trial that does not fit is split or refused."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from likelihood_lab.errors import UsageError, is_out_of_memory
from pipeline.entry import ExitCode
from pipeline.models import ModelBuilder
from pipeline.storage.cells import TrialFolder
from pipeline.text import in_words
from pipeline.trial import budget as budgets
from pipeline.trial import run as trials
from pipeline.trial.budget import Budget, budget_of, check_disk, shrink_tile_to_memory
from pipeline.trial.progress import announce_time
from pipeline.trial.setup import TrialSetup, build_setup
from tests.trials import compose, hashes, trial, usage_error, verdict

WEIGHTS = 4 * (64 * 16 + 16 + 16 * 10 + 10)  # bytes of the MLP 64-16-10


@pytest.fixture(scope="module")
def setting() -> TrialSetup:
    return build_setup(compose())


def sized(machine: int) -> Any:
    """Return `budget_of` for a machine of so many bytes."""
    real = budget_of
    return lambda setting: replace(real(setting), machine=machine)


def test_bytes_of_a_replica_and_a_run(setting: TrialSetup) -> None:
    plain = budget_of(setting)
    hidden, logits, inputs = 64 * 16 * 4, 64 * 10 * 4, 64 * 64 * 4
    assert plain.replica == WEIGHTS * 3 + 2 * (inputs + hidden + logits)
    adam = build_setup(compose("optimizer=adam"))
    assert budget_of(adam).replica == plain.replica + WEIGHTS  # two states, not one
    without = build_setup(compose("optimizer.momentum=0"))
    assert budget_of(without).replica == plain.replica - WEIGHTS
    assert plain.run == 2 * WEIGHTS + budgets.HISTORY_BYTES


class NeedsNumbers(nn.Module):
    """A network whose forward pass depends on the values of its inputs."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.flatten(1)
        if not bool(flat.isfinite().all()):
            raise ValueError("pixels are no numbers")
        logits: torch.Tensor = self.layer(flat)
        return logits


def test_a_model_that_reads_its_inputs_is_measured(setting: TrialSetup) -> None:
    odd = replace(setting, builder=ModelBuilder(NeedsNumbers, "odd", (1, 8, 8), 10))
    assert budget_of(odd).replica == 4 * 650 * 3 + 2 * (64 * 64 * 4 + 64 * 10 * 4)


def test_files_of_a_run_are_near_the_estimate(tmp_path: Path) -> None:
    trial(tmp_path / "t", "loss=[ce]", "seed=[0]", "model.hidden=[512]")
    left = sum(path.stat().st_size for path in (tmp_path / "t").glob("c*/**/*") if path.is_file())
    expected = budget_of(build_setup(compose("model.hidden=[512]"))).run
    assert left / 1.3 < expected < left * 1.3


def test_measuring_leaves_the_random_state_alone(untouched_randomness: None) -> None:
    budget_of(build_setup(compose("model.dropout=0.5")))


def test_a_tile_is_halved_until_it_fits_or_refused(setting: TrialSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = budget_of(setting)
    assert shrink_tile_to_memory(setting) is setting
    monkeypatch.setattr(budgets, "budget_of", sized(int(budget.of(25) / budgets.USABLE)))
    assert shrink_tile_to_memory(setting).tile == 24
    monkeypatch.setattr(budgets, "budget_of", sized(budget.replica))
    with pytest.raises(UsageError, match=r"one run of mlp at batch_size=64 takes about .* lower batch_size"):
        shrink_tile_to_memory(setting)


def test_runs_that_would_fill_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=10_000))
    budget = Budget(replica=1, data=1, machine=1, run=1000)
    check_disk(budget, 10, tmp_path)
    with pytest.raises(UsageError, match=r"11 runs take about 11 kB on disk, and .* has 10 kB left"):
        check_disk(budget, 11, tmp_path)


@pytest.mark.parametrize(("size", "words"), [(999, "999 B"), (45_000_000, "45 MB"), (1_234_000_000, "1.23 GB")])
def test_in_words_gives_three_digits(size: int, words: str) -> None:
    assert in_words(size) == words


def test_is_out_of_memory_knows_three_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert not is_out_of_memory(RuntimeError("something else"))


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let a tile of more than `most` runs end out of memory; return the list of the tile sizes that are tried."""
    sizes: list[int] = []
    train_tile = trials.train_tile

    def limited(setting: TrialSetup, replicas: list[Any], *rest: Any) -> Any:
        sizes.append(len(replicas))
        if len(replicas) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return train_tile(setting, replicas, *rest)

    monkeypatch.setattr(trials, "train_tile", limited)
    return sizes


REQUEST = ("loss=[ce,nll]", "seed=[0,1,2]", "trainer.tile=6")


def test_out_of_memory_halves_the_tile_once_and_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = limit_memory(monkeypatch, most=3)
    assert trial(tmp_path / "t", *REQUEST) == ExitCode.HOLDS
    assert sizes[0] == 6
    assert max(sizes[1:]) <= 3
    assert "out of memory with 6 runs at once; continuing with 3" in capsys.readouterr().out
    assert verdict(tmp_path / "t")["comparisons"][0]["outcome"] == "identical"
    sizes.clear()
    trial(tmp_path / "t", "loss=[ce,nll]", "seed=[0,1,2,3]", "trainer.tile=6")
    assert sizes == [2]
    monkeypatch.undo()
    trial(tmp_path / "whole", *REQUEST)
    assert hashes(tmp_path / "whole").items() <= hashes(tmp_path / "t").items()


def test_out_of_memory_a_second_time_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, most=1)
    line = usage_error(lambda: trial(tmp_path / "t", *REQUEST))
    assert line.startswith("out of memory while training 3 run")
    assert line.endswith("give trainer.tile=1")
    assert TrialFolder(tmp_path / "t").tile == 3


@pytest.mark.parametrize(
    ("seconds", "said"), [(59, ""), (720, "about 12 min to train 900 runs"), (9000, "about 2.5 h to train 900 runs")]
)
def test_only_a_long_time_is_announced(seconds: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    announce_time(seconds, 900)
    printed = capsys.readouterr().out
    assert printed.startswith(said)
    assert bool(printed) == bool(said)
