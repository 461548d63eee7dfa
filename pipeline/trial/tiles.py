"""Training of the missing cells of a trial, tile by tile. A tile with a checkpoint resumes from it.

All cells of a tile are on disk before the next tile begins. Between epochs, partial/<digest>.pt stores the state that
the next epoch needs. It is deleted after the cells of the tile are written. The digest covers everything that decides
the bits. A file of other runs, other code or another machine is therefore never resumed.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import warnings
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from likelihood_lab.errors import UsageError
from pipeline.config import schema as conf
from pipeline.console import console
from pipeline.replica import Replica
from pipeline.storage.cells import Cell, CellRecord, TrialFolder
from pipeline.storage.files import writing_whole
from pipeline.training.module import StackTrainingModule, fit
from pipeline.training.objectives import Objectives
from pipeline.trial.setup import TrialSetup

FORMAT = 2  # raise it when the content of a checkpoint changes
MIN_TRAIN_TO_SAVE_RATIO = 50  # write a checkpoint at most every 50 save durations (2 % overhead)


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of a `state_dict`."""
    sha = hashlib.sha256()
    for name, tensor in weights.items():
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def tiles(missing: Sequence[Replica], arms: Sequence[str], size: int) -> list[list[Replica]]:
    """Return the missing runs in groups of at most `size`, sorted by arm; the arms of a seed share one if they fit."""
    by_seed: dict[int, list[Replica]] = {}
    for replica in sorted(missing, key=lambda r: (r.seed, arms.index(r.arm))):
        by_seed.setdefault(replica.seed, []).append(replica)
    groups: list[list[Replica]] = []
    for replicas in by_seed.values():
        for part in (replicas[i : i + size] for i in range(0, len(replicas), size)):
            if groups and len(groups[-1]) + len(part) <= size:
                groups[-1] += part
            else:
                groups.append(part)
    return [sorted(group, key=lambda r: (arms.index(r.arm), r.seed)) for group in groups]


def train_tile(
    setup: TrialSetup, replicas: list[Replica], folder: TrialFolder, callbacks: Sequence[pl.Callback] = ()
) -> list[Cell]:
    """Train these replicas as one stack, from their checkpoint if there is one, and write the missing cells."""
    present = [f for f in setup.formulations if any(replica.arm == f.name for replica in replicas)]
    objectives = Objectives(
        present, replicas, setup.data.num_classes, setup.device, setup.dtype, setup.recipe.variation
    )
    module = StackTrainingModule(
        setup.stack(replicas),
        objectives,
        replicas,
        setup.data,
        setup.builder.input_shape,
        setup.recipe,
    )
    initial = [weights_sha256(module.stack.weights(slot)) for slot in range(len(replicas))]
    partial = TileCheckpoint(folder.path, setup, replicas)
    partial.restore(module)
    _quiet_lightning()
    fit(module, [*callbacks, partial], "gpu" if setup.device.type == "cuda" else "cpu")
    missing, _ = folder.find_missing({replica: setup.fingerprint(replica) for replica in replicas})
    cells = [
        folder.write(record, *numbers)
        for record, *numbers in _results(module, setup, partial.started, initial)
        if Replica(record.arm, record.seed) in missing
    ]
    partial.remove()
    return cells


def _results(
    module: StackTrainingModule, setup: TrialSetup, started: float, initial: Sequence[str]
) -> Iterator[tuple[CellRecord, Any, dict[str, Any]]]:
    for slot, (replica, divergence) in enumerate(zip(module.replicas, module.divergences(), strict=True)):
        weights = {name: tensor.cpu() for name, tensor in module.stack.weights(slot).items()}
        record = CellRecord(
            arm=replica.arm,
            seed=replica.seed,
            fingerprint=setup.fingerprint(replica),
            made_from=setup.fingerprint_parts(replica.arm),
            environment=dict(setup.environment),
            engine=f"{setup.engine} ({setup.engine_reason})",
            initial_sha256=initial[slot],
            weights_sha256=weights_sha256(weights),
            started=started,
            ended=time.time(),
            diverged_at=None if divergence is None else divergence.step,
            cause=None if divergence is None else divergence.cause,
        )
        sketches = torch.stack([snapshot[slot] for snapshot in module.sketches])
        yield (
            record,
            module.history(slot),
            {
                "weights": weights,
                "sketch_steps": module.sketch_steps,
                "sketches": sketches,
                "batches": module.batches(slot),
            },
        )


@functools.cache
def _quiet_lightning() -> None:
    """Silence Lightning's notices, once a process; the pipeline prints its own."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    # Lightning 2.6 uses a class that torch 2.14 has deprecated; nothing here can change that.
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")


class TileCheckpoint(pl.Callback):
    """Checkpoint of one tile, written between epochs.

    It is written when an epoch begins, so not after the last epoch, whose cells follow at once.
    """

    def __init__(self, folder: Path, setup: TrialSetup, replicas: Sequence[Replica]) -> None:
        self.path, self.replicas = _path(folder, setup, replicas), replicas
        self.every: float | None = setup.trainer["checkpoint_every"]
        self.started = time.time()
        self._due = time.monotonic() + (self.every or 0)
        self._has_warned = False

    def restore(self, module: StackTrainingModule) -> None:
        """Load the checkpoint into the module, if there is one."""
        if self.path.exists():
            kept = _load(self.path)
            self.started = kept["started"]
            module.load_training_state(kept["training_state"])
            done, epochs = module.epochs_done, module.recipe.epochs
            console.print(f"{len(self.replicas)} runs continue from their checkpoint, after epoch {done} of {epochs}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StackTrainingModule)  # noqa: S101 - it is what `fit` was given
        if self.every is None or not trainer.current_epoch or time.monotonic() < self._due:
            return
        began = time.monotonic()
        try:
            self._keep(pl_module)
        except UsageError as error:  # a failed checkpoint does not stop the training
            if not self._has_warned:
                console.print(f"{error}; training continues without a checkpoint")
            self._has_warned = True
        if self.every:  # 0: after every epoch, whatever it costs
            self._due = time.monotonic() + max(self.every, MIN_TRAIN_TO_SAVE_RATIO * (time.monotonic() - began))

    def _keep(self, module: StackTrainingModule) -> None:
        replicas = [(replica.arm, replica.seed) for replica in self.replicas]
        kept = {"replicas": replicas, "started": self.started, "training_state": module.training_state()}
        with writing_whole(self.path) as file:
            sink = _Sink(file)
            torch.save(kept, sink)  # type: ignore[arg-type]  # it needs no more than write and flush
            sink.close()

    def remove(self) -> None:
        """Delete the checkpoint once the cells are written."""
        self.path.unlink(missing_ok=True)


def find_checkpoints(
    folder: Path, setup: TrialSetup, mine: Collection[Replica], missing: Collection[Replica]
) -> list[list[Replica]]:
    """Return the tiles whose checkpoints can be continued; print why the others cannot.

    Args:
        mine: all runs that this process may train.
        missing: the runs without a cell.
    """
    groups: list[list[Replica]] = []
    for path in sorted((folder / "partial").glob("*.pt")):
        try:
            replicas = [Replica(arm, seed) for arm, seed in _load(path)["replicas"]]
        except FileNotFoundError:  # another job has just ended
            continue
        except Exception:  # torch raises many kinds of error for a damaged file
            console.print(f"{path} is damaged and is removed; its runs are trained from the start")
            path.unlink()
            continue
        waiting = {*missing} - {replica for group in groups for replica in group}
        if waiting.isdisjoint(replicas):
            if {*mine}.issuperset(replicas):  # killed between the last cell and here
                path.unlink()
        elif {*mine}.issuperset(replicas) and path == _path(folder, setup, replicas):
            groups.append(replicas)
        else:
            console.print(f"{path} is of other losses, seeds, code, settings or another machine; it is not used")
    return groups


def _path(folder: Path, setup: TrialSetup, replicas: Sequence[Replica]) -> Path:
    fingerprints = [setup.fingerprint(replica) for replica in replicas]
    digest = conf.digest([FORMAT, setup.environment, fingerprints])
    return folder / "partial" / f"{digest[:16]}.pt"


def _load(path: Path) -> dict[str, Any]:
    """Load a checkpoint; check its sums first, since torch does not notice flipped bits."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)
    kept: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return kept


class _Sink:
    """File wrapper that records the first write error and raises it on close; torch.save crashes on a full disk."""

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
        """Do nothing; the owner of the file flushes it."""

    def close(self) -> None:
        if self.error is not None:
            raise self.error
