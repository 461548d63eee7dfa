"""What a trial takes is known before it starts; where it cannot fit it is split, or refused."""

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
from tests.trials import compose, trial, verdict, weights

WEIGHTS = 4 * (64 * 16 + 16 + 16 * 10 + 10)  # bytes of the MLP 64-16-10


@pytest.fixture(scope="module")
def setting() -> TrialSetup:
    return build_setup(compose())


def sized(machine: int) -> Any:
    """`budget_of` on a machine of so many bytes."""
    real = budget_of
    return lambda setting: replace(real(setting), machine=machine)


def test_a_replica_is_weights_gradient_states_and_what_the_backward_pass_needs(setting: TrialSetup) -> None:
    plain = budget_of(setting)
    hidden, logits, inputs = 64 * 16 * 4, 64 * 10 * 4, 64 * 64 * 4
    assert plain.replica == WEIGHTS * 3 + 2 * (inputs + hidden + logits)
    adam = build_setup(compose("optimizer=adam"))
    assert budget_of(adam).replica == plain.replica + WEIGHTS  # two states, not one
    without = build_setup(compose("optimizer.momentum=0"))
    assert budget_of(without).replica == plain.replica - WEIGHTS
    assert plain.run == 2 * WEIGHTS + budgets.HISTORY_BYTES


class NeedsNumbers(nn.Module):
    """A network that looks at its values."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = inputs.flatten(1)
        if not bool(flat.isfinite().all()):
            raise ValueError("pixels are no numbers")
        logits: torch.Tensor = self.layer(flat)
        return logits


def test_a_model_that_needs_numbers_gets_some(setting: TrialSetup) -> None:
    odd = replace(setting, builder=ModelBuilder(NeedsNumbers, "odd", (1, 8, 8), 10))
    assert budget_of(odd).replica == 4 * 650 * 3 + 2 * (64 * 64 * 4 + 64 * 10 * 4)


def test_what_a_run_leaves_on_disk_is_near_the_budget(tmp_path: Path) -> None:
    trial(tmp_path / "t", "loss=[ce]", "seed=[0]", "model.hidden=[512]")
    left = sum(path.stat().st_size for path in (tmp_path / "t").glob("c*/**/*") if path.is_file())
    expected = budget_of(build_setup(compose("model.hidden=[512]"))).run
    assert left / 1.3 < expected < left * 1.3


def test_measuring_leaves_the_random_state_alone(untouched_randomness: None) -> None:
    budget_of(build_setup(compose("model.dropout=0.5")))


def test_a_tile_is_halved_until_it_fits_and_one_run_that_does_not_is_refused(
    setting: TrialSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_sizes_are_said_as_readers_take_them_in(size: int, words: str) -> None:
    assert in_words(size) == words


def test_what_says_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert not is_out_of_memory(RuntimeError("something else"))


def failing(monkeypatch: pytest.MonkeyPatch, above: int) -> list[int]:
    """Training of more runs at once than these ends out of memory; returns the sizes that were tried."""
    tried: list[int] = []
    train_tile = trials.train_tile

    def limited(setting: TrialSetup, replicas: list[Any], *rest: Any) -> Any:
        tried.append(len(replicas))
        if len(replicas) > above:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return train_tile(setting, replicas, *rest)

    monkeypatch.setattr(trials, "train_tile", limited)
    return tried


ASKED = ("loss=[ce,nll]", "seed=[0,1,2]", "trainer.tile=6")


def test_out_of_memory_halves_the_tile_once_and_the_same_command_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = failing(monkeypatch, above=3)
    assert trial(tmp_path / "t", *ASKED) == ExitCode.HOLDS
    assert tried[0] == 6
    assert max(tried[1:]) <= 3
    assert "out of memory with 6 runs at once; going on with 3" in capsys.readouterr().out
    assert verdict(tmp_path / "t")["comparisons"][0]["outcome"] == "identical"
    tried.clear()
    trial(tmp_path / "t", "loss=[ce,nll]", "seed=[0,1,2,3]", "trainer.tile=6")
    assert tried == [2]
    monkeypatch.undo()
    trial(tmp_path / "whole", *ASKED)
    a, b = weights(tmp_path / "t", "nll", 2), weights(tmp_path / "whole", "nll", 2)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_out_of_memory_a_second_time_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, above=1)
    with pytest.raises(UsageError, match=r"out of memory while training 3 run.* give trainer.tile=1"):
        trial(tmp_path / "t", *ASKED)
    assert TrialFolder(tmp_path / "t").tile == 3


@pytest.mark.parametrize(
    ("seconds", "said"), [(59, ""), (720, "about 12 min to train 900 runs"), (9000, "about 2.5 h to train 900 runs")]
)
def test_a_time_is_worth_a_line_where_it_is_long(seconds: float, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    announce_time(seconds, 900)
    printed = capsys.readouterr().out
    assert printed.startswith(said)
    assert bool(printed) == bool(said)
