"""A training that was killed goes on to the bits that it would have had."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
from tests.trials import compose, trial

ADAM = partial(torch.optim.Adam, lr=0.01)
CE = shipped("ce")


class Killed(BaseException):
    """What nothing catches."""


class KilledBefore(pl.Callback):
    """Ends a training when this epoch is about to begin, after what `keep` does."""

    def __init__(self, epoch: int, keep: Callable[[StackTrainingModule], None] = lambda module: None) -> None:
        self.epoch, self.keep = epoch, keep

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StackTrainingModule)
        if trainer.current_epoch == self.epoch:
            self.keep(pl_module)
            raise Killed


class Noisy(nn.Module):
    """Draws, as a loss that adds noise does."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits + 0.1 * torch.randn_like(logits), labels)


class Annealed(nn.Module):
    """Remembers: its calls in an attribute, the last objective in a buffer, the logits' mean in a list."""

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
    """Raises from a call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= 6:
            raise ValueError("no more")
        return F.cross_entropy(logits, labels)


class Counting(nn.Module):
    """A model with a memory outside its tensors."""

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
    "a loss that remembers": (partial(mlp, hidden=[8]), [*CE, own("annealed", Annealed)], {}, "fold"),
    "a model that remembers": (Counting, CE, {}, "loop"),
    "a rate of its own": (partial(mlp, hidden=[8]), [*CE, replace(CE[0], name="slow", lr_scale=0.1)], COSINE, "fold"),
    "a loss that is NaN": (partial(mlp, hidden=[8]), shipped("ce", "kl_literal"), {}, "fold"),
    "a loss that raises": (partial(mlp, hidden=[8]), [*CE, own("raising", RaisingFrom)], {}, "fold"),
    "another that raises only later": (partial(mlp, hidden=[8]), [own("raising", RaisingFrom)], {}, "loop"),
}


def made(case: str) -> StackTrainingModule:
    make, arms, changes, engine = CASES[case]
    data = toy_data((1, 6, 6))
    return untrained(builder(make, data), data, arms, (0, 3), recipe(epochs=4, **changes), engine)


def train(module: StackTrainingModule, *callbacks: pl.Callback) -> StackTrainingModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
        fit(module, callbacks, "cpu")
    return module


def results(module: StackTrainingModule, replica: int) -> dict[str, Any]:
    """Everything that becomes a cell."""
    tensors = {f"weights {name}": tensor for name, tensor in module.stack.weights(replica).items()}
    tensors["sketches"] = torch.stack([sketch[replica] for sketch in module.sketches])
    for batch in module.batches(replica):
        tensors |= {f"{name} at {batch['step']}": batch[name] for name in ("logits", "labels")}
    return tensors


@pytest.mark.parametrize("killed_before", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_killed_training_goes_on_to_the_same_bits(case: str, killed_before: int) -> None:
    whole = train(made(case))
    file = io.BytesIO()
    with pytest.raises(Killed):
        train(made(case), KilledBefore(killed_before, lambda module: torch.save(module.training_state(), file)))
    file.seek(0)
    resumed = made(case)
    resumed.load_training_state(torch.load(file, weights_only=True))
    assert resumed.steps_done == 4 * killed_before
    train(resumed)
    assert list(resumed.divergences()) == list(whole.divergences())
    for replica in range(len(whole.replicas)):
        assert same_bits(results(resumed, replica), results(whole, replica))
        pd.testing.assert_frame_equal(resumed.history(replica), whole.history(replica), check_exact=True)


# --- in a trial's folder

REQUEST = ("loss=[nll,ce]", "seed=[0,1,2]", "epochs=4", "trainer.checkpoint_every=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "trial"
    trial(path, *REQUEST)
    return path


@pytest.fixture(autouse=True)
def _without_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.trial.run.conclude", lambda *_: (ExitCode.HOLDS, {}))


def killed_before(epoch: int, path: Path, *request: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch_fit(patch, KilledBefore(epoch))
        with pytest.raises(Killed):
            trial(path, *(request or REQUEST))


def patch_fit(patch: pytest.MonkeyPatch, callback: pl.Callback) -> list[int]:
    """Trainings get a callback more, after their own; the list grows by the epochs with which each began."""
    begun: list[int] = []

    def fitting(module: StackTrainingModule, callbacks: Any, accelerator: str) -> None:
        begun.append(module.epochs_done)
        fit(module, [*callbacks, callback], accelerator)

    patch.setattr("pipeline.trial.tiles.fit", fitting)
    return begun


def hashes(path: Path) -> dict[str, str]:
    return {f"{cell.record.arm}/s{cell.record.seed}": cell.record.weights_sha256 for cell in TrialFolder(path).cells()}


def kept(path: Path) -> list[Path]:
    return sorted((path / "partial").glob("*"))


def epochs_begun_with(path: Path, *request: str) -> list[int]:
    """Run the trial; of each stack that was trained, how many epochs it had behind it."""
    with pytest.MonkeyPatch.context() as patch:
        begun = patch_fit(patch, pl.Callback())
        trial(path, *(request or REQUEST))
    return begun


def test_the_same_command_goes_on_and_leaves_nothing_behind(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_before(3, tmp_path / "t")
    assert len(kept(tmp_path / "t")) == 1
    assert epochs_begun_with(tmp_path / "t") == [3]
    assert "6 runs go on where they were interrupted, after epoch 3 of 4" in capsys.readouterr().out
    assert kept(tmp_path / "t") == []
    assert hashes(tmp_path / "t") == hashes(whole)
    for cell, other in zip(TrialFolder(tmp_path / "t").cells(), TrialFolder(whole).cells(), strict=True):
        pd.testing.assert_frame_equal(cell.history, other.history, check_exact=True)


def test_killed_while_cells_are_written_the_tile_goes_on_and_writes_the_rest(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = TrialFolder.write, iter(range(100))

    def dying(self: TrialFolder, *cell: Any) -> Any:
        if next(calls) == 2:
            raise Killed
        return write(self, *cell)

    monkeypatch.setattr(TrialFolder, "write", dying)
    with pytest.raises(Killed):
        trial(tmp_path / "t", *REQUEST)
    monkeypatch.setattr(TrialFolder, "write", write)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "t" / "cells").glob("*/*/state.pt")}
    assert len(before) == 2
    grown = (*REQUEST, "seed=[0,1,2,3]")  # what was interrupted is gone on with, whatever else is asked for
    assert epochs_begun_with(tmp_path / "t", *grown) == [3, 0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert hashes(whole).items() < hashes(tmp_path / "t").items()


def test_killed_after_the_last_cell_what_was_kept_goes(whole: Path, tmp_path: Path) -> None:
    killed_before(3, tmp_path / "t")
    (left,) = kept(tmp_path / "t")
    content = left.read_bytes()
    trial(tmp_path / "t", *REQUEST)
    left.write_bytes(content)
    assert epochs_begun_with(tmp_path / "t") == []
    assert kept(tmp_path / "t") == []


@pytest.mark.parametrize("damage", ["cut", "a flipped bit", "empty"])
def test_what_is_damaged_is_said_and_trained_from_the_start(
    damage: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_before(3, tmp_path / "t")
    (left,) = kept(tmp_path / "t")
    content = bytearray(left.read_bytes())
    content[len(content) // 2] ^= 1
    left.write_bytes({"cut": content[: len(content) // 2], "a flipped bit": content, "empty": b""}[damage])
    assert epochs_begun_with(tmp_path / "t") == [0]
    assert f"{left} is damaged and is removed; its runs are trained from the start" in capsys.readouterr().out
    assert hashes(tmp_path / "t") == hashes(whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [("pipeline.trial.setup.ENGINE_VERSION", 0), ("pipeline.trial.tiles.FORMAT", 0)],
    ids=["engine", "format"],
)
def test_what_other_code_kept_is_not_gone_on_from(
    name: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_before(2, tmp_path / "t")
    monkeypatch.setattr(name, value)
    assert epochs_begun_with(tmp_path / "t") == [0]
    said = " ".join(capsys.readouterr().out.split())
    assert "was kept with other losses, seeds, code or settings, or elsewhere; it is not used" in said


def test_what_another_job_of_the_folder_keeps_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed_before(2, tmp_path / "t")
    before = kept(tmp_path / "t")
    assert epochs_begun_with(tmp_path / "t", *REQUEST, "seed=[7]") == [0]
    assert kept(tmp_path / "t") == before
    assert "not used" not in capsys.readouterr().out


def test_short_trials_keep_nothing_and_long_ones_may_be_told_not_to(tmp_path: Path) -> None:
    for every in ("60", "null"):
        killed_before(3, tmp_path / every, *REQUEST, f"trainer.checkpoint_every={every}")
        assert kept(tmp_path / every) == []
    with pytest.raises(Exception, match=r"checkpoint_every=-1.*at least 0"):
        compose("trainer.checkpoint_every=-1")


def test_where_it_cannot_be_kept_training_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def on_a_full_disk(path: Path) -> Iterator[IO[bytes]]:
        with refusing_disk_errors(path.parent), Path("/dev/full").open("wb") as file:
            yield file

    monkeypatch.setattr("pipeline.trial.tiles.writing_whole", on_a_full_disk)
    trial(tmp_path / "t", *REQUEST)
    line = "No space left on device; free space or choose another folder; training goes on, and a kill would cost what"
    assert capsys.readouterr().out.count(line) == 1
    assert hashes(tmp_path / "t") == hashes(whole)


def test_a_cnn_in_the_loop_goes_on_tile_by_tile(tmp_path: Path) -> None:
    config = compose("loss=[nll,ce]", "seed=[0,1,2]", "epochs=2", "trainer.checkpoint_every=0")
    config |= {"model": {"_target_": "pipeline.models.cnn", "channels": [4], "hidden": 8}}
    run(config, tmp_path / "whole", "x")
    with pytest.MonkeyPatch.context() as patch:
        begun = patch_fit(patch, KilledBefore(1))
        with pytest.raises(Killed):
            run(config, tmp_path / "t", "x")
        assert begun == [0]
        begun = patch_fit(patch, pl.Callback())
        run(config, tmp_path / "t", "x")
        assert begun == [1, 0]
    assert hashes(tmp_path / "t") == hashes(tmp_path / "whole")
