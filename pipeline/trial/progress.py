"""A progress bar with throughput and the losses' objectives, and an estimate of what a long training takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from pipeline.console import console
from pipeline.replica import Replica
from pipeline.training.module import StackTrainingModule
from pipeline.trial.setup import TrialSetup

PROBE = 5.0  # seconds of training from which the whole time is estimated
LONG = 60.0  # seconds; a shorter training prints no estimate


def announce_time(seconds: float, runs: int) -> None:
    """Print an estimate of the time of a long training."""
    if seconds > LONG:
        taken = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
        console.print(f"about {taken} to train {runs} runs, at the pace of the first seconds")


class Progress:
    """Progress bar over all epochs of all tiles; hidden if the configuration or the terminal says so."""

    def __init__(self, console: Console, groups: Sequence[Sequence[Replica]], setup: TrialSetup) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        alone = setup.share is None  # the bars of several jobs would overwrite each other
        silent = not (alone and setup.trainer["progress"] and console.is_terminal)
        news = TextColumn("{task.fields[news]}")
        self.bars = Bars(*columns, news, console=console, disable=silent, transient=True)
        self.task = self.bars.add_task("", total=len(groups) * setup.recipe.epochs, news="")
        self.runs, self.estimated = sum(map(len, groups)), False

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def callback(self) -> pl.Callback:
        """Return the Lightning callback for one tile."""
        return _EpochNews(self)


class _EpochNews(pl.Callback):
    """Updates the bar when the next epoch begins: `on_train_epoch_end` is called before the metrics are computed."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StackTrainingModule)  # noqa: S101 - it is what `fit` was given
        self.started, self.steps_before = time.perf_counter(), pl_module.steps_done
        self.progress.bars.advance(self.progress.task, pl_module.epochs_done)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.progress.estimated or time.perf_counter() - self.started < PROBE:
            return
        assert isinstance(pl_module, StackTrainingModule)  # noqa: S101 - it is what `fit` was given
        self.progress.estimated = True
        announce_time(self.progress.runs * pl_module.last_step / self._rate(pl_module), self.progress.runs)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self._tell(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(pl_module)

    def _tell(self, module: pl.LightningModule) -> None:
        if self.progress.bars.disable:
            return
        assert isinstance(module, StackTrainingModule)  # noqa: S101 - it is what `fit` was given
        losses = "  ".join(f"{arm} {value:.4g}" for arm, value in module.latest("val/nll").items())
        self.progress.bars.update(
            self.progress.task, advance=1, news=f"{self._rate(module):,.0f} run-steps/s  val/nll {losses}"
        )

    def _rate(self, module: StackTrainingModule) -> float:
        """Steps of single runs a second."""
        return (module.steps_done - self.steps_before) * len(module.replicas) / (time.perf_counter() - self.started)
