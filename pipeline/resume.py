"""A tile in the middle of its training, on disk: a kill costs what was done since, and not the tile.

partial/<digest>.pt holds what the next epoch depends on, and goes once the tile's cells are written. The digest is of
everything that decides the bits, so that a file of other runs, code or another machine is never gone on from.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
import torch

from pipeline import config as conf
from pipeline.cells import writing_whole
from pipeline.errors import UsageError
from pipeline.module import SideBySide
from pipeline.objectives import Replica
from pipeline.setting import Setting
from pipeline.terminal import console

FORMAT = 1  # raised whenever what is kept changes
SHARE = 50  # training takes at least so many times as long as keeping it


class Partial(pl.Callback):
    """One tile's training as it is kept between epochs.

    Kept when an epoch begins, so not after the last: its cells follow at once.
    """

    def __init__(self, folder: Path, setting: Setting, replicas: Sequence[Replica]) -> None:
        self.path, self.replicas = _path(folder, setting, replicas), replicas
        self.every: float | None = setting.config["trainer"]["checkpoint_every"]
        self.started = time.time()
        self._due = time.monotonic() + (self.every or 0)
        self._said = False

    def give_back(self, module: SideBySide) -> None:
        """Let the module go on from what was kept, where something was."""
        if self.path.exists():
            kept = _load(self.path)
            self.started = kept["started"]
            module.go_on_from(kept["progress"])
            done, epochs = module.epochs_done, module.recipe.epochs
            console.print(
                f"{len(self.replicas)} runs go on where they were interrupted, after epoch {done} of {epochs}"
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SideBySide)  # noqa: S101 - it is what `fit` was given
        if self.every is None or not trainer.current_epoch or time.monotonic() < self._due:
            return
        began = time.monotonic()
        try:
            self._keep(pl_module)
        except UsageError as error:  # a precaution that fails is no reason to stop
            if not self._said:
                console.print(f"{error}; training goes on, and a kill would cost what was done since")
            self._said = True
        if self.every:  # 0: after every epoch, whatever it costs
            self._due = time.monotonic() + max(self.every, SHARE * (time.monotonic() - began))

    def _keep(self, module: SideBySide) -> None:
        replicas = [(replica.arm, replica.seed) for replica in self.replicas]
        kept = {"replicas": replicas, "started": self.started, "progress": module.progress()}
        with writing_whole(self.path) as file:
            sink = _Sink(file)
            torch.save(kept, sink)  # type: ignore[arg-type]  # it needs no more than write and flush
            sink.close()

    def remove(self) -> None:
        """Once the cells are there."""
        self.path.unlink(missing_ok=True)


def interrupted(
    folder: Path, setting: Setting, mine: Collection[Replica], missing: Collection[Replica]
) -> list[list[Replica]]:
    """The tiles of a trial's folder that can be gone on with; what stands in the way of the others is said.

    Args:
        mine: all runs that this process may train.
        missing: those without a cell.
    """
    groups: list[list[Replica]] = []
    for path in sorted((folder / "partial").glob("*.pt")):
        try:
            replicas = [Replica(arm, seed) for arm, seed in _load(path)["replicas"]]
        except FileNotFoundError:  # another job's, which has ended
            continue
        except Exception:  # whatever torch says of a damaged file
            console.print(f"{path} is damaged and is removed; its runs are trained from the start")
            path.unlink()
            continue
        waiting = {*missing} - {replica for group in groups for replica in group}
        if waiting.isdisjoint(replicas):
            if {*mine}.issuperset(replicas):  # killed between the last cell and here
                path.unlink()
        elif {*mine}.issuperset(replicas) and path == _path(folder, setting, replicas):
            groups.append(replicas)
        else:
            console.print(f"{path} was kept with other losses, seeds, code or settings, or elsewhere; it is not used")
    return groups


def _path(folder: Path, setting: Setting, replicas: Sequence[Replica]) -> Path:
    fingerprints = [setting.fingerprint(replica) for replica in replicas]
    digest = conf.digest([FORMAT, setting.environment, fingerprints])
    return folder / "partial" / f"{digest[:16]}.pt"


def _load(path: Path) -> dict[str, Any]:
    """What was kept; torch itself reads over flipped bits."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)
    kept: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return kept


class _Sink:
    """A file that keeps its first error to itself until it is closed: on a full disk torch dies in ways of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """Left to whoever opened the file."""

    def close(self) -> None:
        if self.error is not None:
            raise self.error
