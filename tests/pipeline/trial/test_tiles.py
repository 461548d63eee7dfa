"""A killed training resumes from its checkpoint and ends with the same bits."""

from __future__ import annotations

import io
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.entry import ExitCode
from pipeline.models import cnn, mlp
from pipeline.storage.cells import TrialFolder
from pipeline.storage.files import refusing_disk_errors
from pipeline.training.module import StackTrainingModule, fit
from pipeline.training.objectives import Formulation
from pipeline.trial.run import run
from tests.laboratory import builder, recipe, same_bits, sgd, shipped, toy_data, untrained
from tests.trials import compose, hashes, trial, usage_error

ADAM = partial(torch.optim.Adam, lr=0.01)
CE = shipped("ce")


class Killed(BaseException):
    """Stands for a kill: no handler catches it."""


class KillBefore(pl.Callback):
    """Ends a training right before this epoch; calls `save` first."""

    def __init__(self, epoch: int, save: Callable[[StackTrainingModule], None] = lambda module: None) -> None:
        self.epoch, self.save = epoch, save

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StackTrainingModule)
        if trainer.current_epoch == self.epoch:
            self.save(pl_module)
            raise Killed


class Noisy(nn.Module):
    """A loss that draws random numbers."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits + 0.1 * torch.randn_like(logits), labels)


class Annealed(nn.Module):
    """A loss with state: number of calls, last objective (a buffer) and means of the logits (a list)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.means: list[float] = []
        self.register_buffer("last", torch.tensor(1.0))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        self.means.append(logits.mean().item())
        smoothing = 0.1 / self.calls * torch.sigmoid(self.last).item() * math.exp(-sum(self.means))
        objective = F.cross_entropy(logits, labels, label_smoothing=min(smoothing, 0.5))
        self.last = objective.detach()
        return objective


class RaisingFrom(nn.Module):
    """A loss that raises from its sixth call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= 6:
            raise ValueError("no more")
        return F.cross_entropy(logits, labels)


class Counting(nn.Module):
    """A model with state outside its tensors."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(math.prod(input_shape), num_classes)
        self.batches = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.batches += self.training
        logits: Tensor = self.head(inputs.flatten(1))
        return logits * (1 + 0.1 * self.batches)


def own(name: str, make: Callable[[], Any]) -> Formulation:
    return Formulation(name, ("logits", "labels"), make)


DROPOUT = partial(mlp, hidden=[8, 8], batch_norm=True, dropout=0.3)
COSINE = {"make_optimizer": ADAM, "schedule": "cosine", "warmup_steps": 3}
CASES: dict[str, tuple[Any, list[Formulation], dict[str, Any], str]] = {
    "mlp": (partial(mlp, hidden=[8]), shipped("ce", "nll"), {}, "fold"),
    "momentum and clipping": (partial(mlp, hidden=[8]), CE, {"make_optimizer": sgd, "clip_norm": 0.3}, "fold"),
    "dropout and batch norm, folded": (DROPOUT, shipped("ce", "brier"), COSINE, "fold"),
    "dropout and batch norm, in the loop": (DROPOUT, shipped("ce", "brier"), COSINE, "loop"),
    "cnn": (partial(cnn, channels=[4, 4], hidden=8), CE, {"make_optimizer": ADAM}, "loop"),
    "a loss that draws": (partial(mlp, hidden=[8]), [*CE, own("noisy", Noisy)], {}, "fold"),
    "a loss with state": (partial(mlp, hidden=[8]), [*CE, own("annealed", Annealed)], {}, "fold"),
    "a model with state": (Counting, CE, {}, "loop"),
    "a rate of its own": (partial(mlp, hidden=[8]), [*CE, replace(CE[0], name="slow", lr_scale=0.1)], COSINE, "fold"),
    "a loss that is NaN": (partial(mlp, hidden=[8]), shipped("ce", "kl_literal"), {}, "fold"),
    "a loss that raises": (partial(mlp, hidden=[8]), [*CE, own("raising", RaisingFrom)], {}, "fold"),
    "another that raises only later": (partial(mlp, hidden=[8]), [own("raising", RaisingFrom)], {}, "loop"),
}


def make(case: str) -> StackTrainingModule:
    model, arms, changes, engine = CASES[case]
    data = toy_data((1, 6, 6))
    return untrained(builder(model, data), data, arms, (0, 3), recipe(epochs=4, **changes), engine)


def train(module: StackTrainingModule, *callbacks: pl.Callback) -> StackTrainingModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
        fit(module, callbacks, "cpu")
    return module


@cache
def uninterrupted(case: str) -> StackTrainingModule:
    return train(make(case))


def results(module: StackTrainingModule, replica: int) -> dict[str, Any]:
    """Return all tensors that are written to a cell."""
    tensors = {f"weights {name}": tensor for name, tensor in module.stack.weights(replica).items()}
    tensors["sketches"] = torch.stack([sketch[replica] for sketch in module.sketches])
    for batch in module.batches(replica):
        tensors |= {f"{name} at {batch['step']}": batch[name] for name in ("logits", "labels")}
    return tensors


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_ends_with_the_same_bits(case: str, epoch: int) -> None:
    whole, file = uninterrupted(case), io.BytesIO()
    with pytest.raises(Killed):
        train(make(case), KillBefore(epoch, lambda module: torch.save(module.training_state(), file)))
    file.seek(0)
    resumed = make(case)
    resumed.load_training_state(torch.load(file, weights_only=True))
    assert resumed.steps_done == 4 * epoch
    train(resumed)
    assert list(resumed.divergences()) == list(whole.divergences())
    for replica in range(len(whole.replicas)):
        assert same_bits(results(resumed, replica), results(whole, replica))
        pd.testing.assert_frame_equal(resumed.history(replica), whole.history(replica), check_exact=True)


# --- in a trial's folder

REQUEST = ("loss=[nll,ce]", "seed=[0,1,2]", "epochs=4", "trainer.checkpoint_every=0")


@pytest.fixture(autouse=True, scope="module")
def _without_a_verdict() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.trial.run.conclude", lambda *_: (ExitCode.HOLDS, {}))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "trial"
    trial(path, *REQUEST)
    return path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trial killed after epoch 3, with one checkpoint."""
    path = tmp_path_factory.mktemp("killed") / "trial"
    assert start_epochs(path, callback=KillBefore(3)) == [0]
    assert len(checkpoints(path)) == 1
    return path


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "t"))


def start_epochs(path: Path, *request: str, callback: pl.Callback | None = None, config: Any = None) -> list[int]:
    """Run the trial and return the epoch at which each tile began; `callback` may kill it."""
    begun: list[int] = []

    def counting_fit(module: StackTrainingModule, callbacks: Any, accelerator: str) -> None:
        begun.append(module.epochs_done)
        fit(module, [*callbacks, callback or pl.Callback()], accelerator)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed) if callback else nullcontext():
        patch.setattr("pipeline.trial.tiles.fit", counting_fit)
        run(config or compose(*REQUEST, *request), path, "the command")
    return begun


def checkpoints(path: Path) -> list[Path]:
    return sorted((path / "partial").glob("*"))


def test_a_killed_trial_resumes_and_leaves_nothing(
    whole: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start_epochs(copied) == [3]
    assert "6 runs continue from their checkpoint, after epoch 3 of 4" in capsys.readouterr().out
    assert checkpoints(copied) == []
    assert hashes(copied) == hashes(whole)
    for cell, other in zip(TrialFolder(copied).cells(), TrialFolder(whole).cells(), strict=True):
        pd.testing.assert_frame_equal(cell.history, other.history, check_exact=True)


def test_killed_while_cells_are_written(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupted tile resumes and writes the missing cells, also where more seeds are requested."""
    write, calls = TrialFolder.write, iter(range(100))

    def dying(self: TrialFolder, *cell: Any) -> Any:
        if next(calls) == 2:
            raise Killed
        return write(self, *cell)

    with monkeypatch.context() as patch:
        patch.setattr(TrialFolder, "write", dying)
        with pytest.raises(Killed):
            trial(tmp_path / "t", *REQUEST)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t" / "cells").glob("*/*/state.pt")}
    assert len(before) == 2
    assert start_epochs(tmp_path / "t", "seed=[0,1,2,3]") == [3, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert hashes(whole).items() < hashes(tmp_path / "t").items()


def test_killed_after_the_last_cell(copied: Path) -> None:
    """A checkpoint whose cells are all written is removed."""
    (checkpoint,) = checkpoints(copied)
    content = checkpoint.read_bytes()
    trial(copied, *REQUEST)
    checkpoint.write_bytes(content)
    assert start_epochs(copied) == []
    assert checkpoints(copied) == []


@pytest.mark.parametrize("damage", ["cut", "a flipped bit", "empty"])
def test_a_damaged_checkpoint_is_removed(
    damage: str, whole: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = checkpoints(copied)
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes({"cut": content[: len(content) // 2], "a flipped bit": content, "empty": b""}[damage])
    assert start_epochs(copied) == [0]
    assert f"{checkpoint} is damaged and is removed; its runs are trained from the start" in capsys.readouterr().out
    assert hashes(copied) == hashes(whole)


@pytest.mark.parametrize("name", ["pipeline.trial.setup.ENGINE_VERSION", "pipeline.trial.tiles.FORMAT"])
def test_a_checkpoint_of_other_code_is_not_used(
    name: str, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(name, 0)
    assert start_epochs(copied) == [0]
    output = " ".join(capsys.readouterr().out.split())
    assert "is of other losses, seeds, code, settings or another machine; it is not used" in output


def test_a_checkpoint_of_another_job_is_left_alone(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = checkpoints(copied)
    assert start_epochs(copied, "seed=[7]") == [0]
    assert checkpoints(copied) == before
    assert "not used" not in capsys.readouterr().out


def test_checkpoint_every(tmp_path: Path) -> None:
    """Short trials write no checkpoint; null turns checkpoints off."""
    for every in ("60", "null"):
        start_epochs(tmp_path / every, f"trainer.checkpoint_every={every}", callback=KillBefore(3))
        assert checkpoints(tmp_path / every) == []
    line = usage_error(lambda: compose("trainer.checkpoint_every=-1"))
    assert "checkpoint_every=-1" in line
    assert "at least 0" in line


def test_training_goes_on_if_a_checkpoint_cannot_be_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def on_a_full_disk(path: Path) -> Iterator[IO[bytes]]:
        with refusing_disk_errors(path.parent), Path("/dev/full").open("wb") as file:
            yield file

    monkeypatch.setattr("pipeline.trial.tiles.writing_whole", on_a_full_disk)
    trial(tmp_path / "t", *REQUEST)
    line = "No space left on device; free space or choose another folder; training continues without a checkpoint"
    assert capsys.readouterr().out.count(line) == 1
    assert hashes(tmp_path / "t") == hashes(whole)


def test_a_cnn_in_the_loop_resumes_tile_by_tile(tmp_path: Path) -> None:
    config = compose("loss=[nll,ce]", "seed=[0,1,2]", "epochs=2", "trainer.checkpoint_every=0")
    config |= {"model": {"_target_": "pipeline.models.cnn", "channels": [4], "hidden": 8}}
    run(config, tmp_path / "whole", "x")
    assert start_epochs(tmp_path / "t", config=config, callback=KillBefore(1)) == [0]
    assert start_epochs(tmp_path / "t", config=config) == [1, 0]
    assert hashes(tmp_path / "t") == hashes(tmp_path / "whole")
