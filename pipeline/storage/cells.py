"""The folder of a trial: what is done, what is missing, and writing that is whole or not at all.

trial.yaml                      what the folder is for; another configuration is refused
cells/<arm>/s<seed>/            config.yaml, history.parquet, state.pt: the source of truth
controls/<arm>/s<seed>/         the same of replay, placebos and dose
partial/<digest>.pt             a tile in the middle of its training, where it was killed
tile                            how many replicas fit at once, where more ran out of memory
stale/<arm>/s<seed>-<digest>/   cells made by other code, data or environment, or damaged, kept out of the way
verdict.json report.html figures/ checkpoints/    rebuilt from the cells
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from likelihood_lab.errors import UsageError
from likelihood_lab.stats.pairs import measured_in
from pipeline.engine.sketch import sketch_distance
from pipeline.replica import Replica, is_control
from pipeline.storage.files import (
    flush_to_disk,
    parquet_bytes,
    read_yaml,
    refusing_disk_errors,
    sha256,
    torch_bytes,
    write_whole,
    yaml_bytes,
)

SEALED = ("history.parquet", "state.pt")  # the files of a cell whose SHA-256 stands in its config.yaml
SEAL = b"# SHA-256 of the lines above: "  # begins the last line of config.yaml
UNSEALED = re.compile(rb"\n  state\.pt: [0-9a-f]{64}\n\Z")  # how config.yaml ended before there was a seal
OUTDATED = "made by other code, settings, data or environment"


class DamagedCellError(Exception):
    """What is wrong with a cell, in a few words."""


@dataclass(frozen=True)
class CellRecord:
    """Everything about a cell but its numbers; `config.yaml`."""

    arm: str
    seed: int
    fingerprint: str
    made_from: dict[str, Any]  # what the fingerprint is the digest of
    environment: dict[str, Any]
    engine: str
    initial_sha256: str  # of the weights before the first step
    weights_sha256: str
    started: float
    ended: float
    diverged_at: int | None = None
    cause: str | None = None
    files: dict[str, str] = field(default_factory=dict)  # name -> SHA-256 of the other files


@dataclass(frozen=True)
class Cell:
    """The result of one (arm, seed), read back from its folder by `load_verified_cell`."""

    folder: Path
    record: CellRecord

    @cached_property
    def history(self) -> pd.DataFrame:
        """Columns metric, step, value."""
        return pd.read_parquet(self.folder / "history.parquet")

    @property
    def weights(self) -> dict[str, Tensor]:
        """The plain module's `state_dict`, read anew each time: many cells' weights may not fit into memory."""
        weights: dict[str, Tensor] = self._state()["weights"]
        return weights

    @cached_property
    def sketches(self) -> tuple[list[int], Tensor]:
        """Steps, and the weights' sketches at them, [steps, width]."""
        state = self._state()
        return state["sketch_steps"], state["sketches"]

    def distances_from(self, reference: Cell) -> list[tuple[int, float]]:
        """(step, relative distance of the weights) at each snapshot; none where the two were not taken alike."""
        (steps, mine), (others, theirs) = self.sketches, reference.sketches
        if steps != others or mine.shape != theirs.shape:
            return []
        return list(zip(steps, sketch_distance(mine, theirs).tolist(), strict=True))

    @property
    def batches(self) -> list[dict[str, Any]]:
        """Logits [B, C], labels [B] and soft target_probs [B, C] that reached the loss at a few steps.

        Empty in cells of older versions.
        """
        met: list[dict[str, Any]] = self._state().get("batches", [])
        return met

    def _state(self) -> dict[str, Any]:
        path = self.folder / "state.pt"
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            line = f"{path} holds more than weights and was not read, since that would run code; delete its cell"
            raise UsageError(line) from error
        return state

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The last value of every yardstick that is one, NaN where none is."""
        measured = zip(self.history["metric"].tolist(), self.history["value"].tolist(), strict=True)
        rows = [(metric, value) for metric, value in measured if metric != "train/objective"]
        return {metric: math.nan for metric, _ in rows} | {metric: value for metric, value in rows if value == value}


def load_verified_cell(folder: Path) -> Cell:
    """The cell in a folder, once each of its files was found as it was written: nothing else is evidence of anything.

    Raises:
        DamagedCellError: a file is missing, cut short or changed, or the folder is a copy of another cell's.
    """
    record = _record(folder / "config.yaml")
    own = f"{record.arm}/s{record.seed}"
    if own != f"{folder.parent.name}/{folder.name}":
        raise DamagedCellError(f"it is a copy of {own}")
    for name in SEALED:
        with _reading(folder / name), (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.files.get(name):
                raise DamagedCellError(f"{name} is not as it was written")
    return Cell(folder, record)


def _record(path: Path) -> CellRecord:
    with _reading(path):
        content = path.read_bytes()
    text, mark, seal = content.rpartition(SEAL)
    if not mark and UNSEALED.search(content):
        raise DamagedCellError(f"{path.name} bears no seal: an older version wrote it")
    if sha256(text) != seal.decode(errors="replace").strip():
        raise DamagedCellError(f"{path.name} is not as it was written")
    try:
        return CellRecord(**yaml.load(text, Loader=yaml.CSafeLoader))
    except TypeError as error:
        raise DamagedCellError(f"{path.name} was written by another version") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedCellError(f"{path.name} is missing") from error
    except OSError as error:
        raise DamagedCellError(f"{path.name} cannot be read ({error.strerror})") from error


class TrialFolder:
    """One trial's folder. What all its cells share is written by one process at once, and so is each seed's."""

    def __init__(self, path: Path) -> None:
        path = Path(os.path.abspath(path))  # its name is what its runs are found by, `.` is none
        self.path = path
        self._lock = filelock.FileLock(path / ".lock")
        self._known: dict[Replica, Cell] = {}  # what this process wrote or has read
        self.damaged: dict[Replica, str] = {}  # what is wrong with cells that it could not read

    @contextmanager
    def locked(self, *, patiently: bool = False) -> Iterator[None]:
        """Hold the folder, which is made where absent; refused while another process does, unless patiently."""
        new = not self.path.exists()
        with refusing_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._acquire(self._lock, patiently)
        try:
            yield
        finally:
            self._lock.release()
            if new and [entry.name for entry in self.path.iterdir()] == [
                ".lock"
            ]:  # a request that was refused after all
                shutil.rmtree(self.path, ignore_errors=True)

    def release_lock(self) -> None:
        """Hold the folder no longer: other jobs prepare themselves and train the cells of their own seeds."""
        self._lock.release()

    @contextmanager
    def training(self, seeds: Sequence[int]) -> Iterator[None]:
        """Hold the cells of these seeds; refused while another process does."""
        with ExitStack() as held:
            for seed in seeds:
                lock = filelock.FileLock(self.path / ".training" / f"s{seed}")
                with refusing_disk_errors(self.path):
                    Path(lock.lock_file).parent.mkdir(exist_ok=True)
                self._acquire(lock)
                held.callback(lock.release)
            yield

    def _acquire(self, lock: filelock.BaseFileLock, patiently: bool = False) -> None:
        with refusing_disk_errors(self.path):
            try:
                lock.acquire(blocking=patiently)
            except filelock.Timeout as error:
                busy = f"{self.path} is in use by another process; wait for it or choose another folder"
                raise UsageError(busy) from error

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        """State what the folder is for."""
        self.check_identity(identity)
        write_whole(self.path / "trial.yaml", yaml_bytes(dict(identity)))

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Refuse a folder that is for something else."""
        statement = self.path / "trial.yaml"
        if not statement.exists():
            if (self.path / "cells").exists():
                raise UsageError(f"{self.path} holds cells but no trial.yaml: it is no trial's folder; choose another")
            return
        found = read_yaml(statement)
        differing = sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))
        if differing:
            raise UsageError(
                f"{self.path} holds a trial with another {', '.join(differing)}; choose another folder "
                "(hydra.run.dir=DIR) or give the configuration that it was made with"
            )

    @property
    def tile(self) -> int | None:
        """How many replicas fit at once, where more ran out of memory here."""
        try:
            return int((self.path / "tile").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def remember_tile(self, size: int) -> None:
        """So that the same command goes on with it."""
        with self.locked(patiently=True):
            write_whole(self.path / "tile", f"{size}\n".encode())

    def cell_path(self, replica: Replica) -> Path:
        kind = "controls" if is_control(replica.arm) else "cells"
        return self.path / kind / replica.arm / f"s{replica.seed}"

    def read(self, replica: Replica) -> Cell | None:
        """The cell where it is there as it was written, else None; `damaged` then tells what is wrong with it."""
        folder = self.cell_path(replica)
        if os.path.lexists(folder) and replica not in self._known and replica not in self.damaged:
            try:
                self._known[replica] = load_verified_cell(folder)
            except DamagedCellError as error:
                self.damaged[replica] = str(error)
        return self._known.get(replica)

    def cells(self, kind: str = "cells") -> list[Cell]:
        """All cells, or all `controls`, by arm and seed."""
        folders = [path for path in self.path.glob(f"{kind}/*/s*") if path.name[1:].isdecimal()]
        order = sorted((path.parent.name, int(path.name[1:])) for path in folders)
        return [cell for arm, seed in order if (cell := self.read(Replica(arm, seed))) is not None]

    def find_missing(self, wanted: Mapping[Replica, str]) -> tuple[list[Replica], dict[Replica, str]]:
        """Which of the wanted cells (with their fingerprints) are missing, and why some of those moved to `stale/`.

        A cell with another fingerprint was made by other code, data or environment; another is damaged.
        """
        missing, moved = [], {}
        for replica, fingerprint in wanted.items():
            cell = self.read(replica)
            if cell is not None and cell.record.fingerprint == fingerprint:
                continue
            missing.append(replica)
            if cell is not None:
                moved[replica] = OUTDATED
                self._set_aside(replica, cell.record.fingerprint[:12])
            elif replica in self.damaged:
                moved[replica] = self.damaged[replica]
                self._set_aside(replica, "damaged")
        return missing, moved

    def _set_aside(self, replica: Replica, mark: str) -> None:
        aside = self.path / "stale" / replica.arm / f"s{replica.seed}-{mark}"
        self._known.pop(replica, None)
        self.damaged.pop(replica, None)
        with refusing_disk_errors(self.path):
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            self.cell_path(replica).rename(aside)

    def write(self, record: CellRecord, history: pd.DataFrame, state: Mapping[str, Any]) -> Cell:
        """Write a cell and rename it into place whole."""
        replica = Replica(record.arm, record.seed)
        target = self.cell_path(replica)
        draft = target.with_name(f".{target.name}-draft")
        contents = {"history.parquet": parquet_bytes(history), "state.pt": torch_bytes(state)}
        record = replace(record, files={name: sha256(content) for name, content in contents.items()})
        text = yaml_bytes(asdict(record))
        contents["config.yaml"] = text + SEAL + sha256(text).encode() + b"\n"
        with refusing_disk_errors(self.path):
            shutil.rmtree(draft, ignore_errors=True)
            try:
                draft.mkdir(parents=True)
                for name, content in contents.items():
                    (draft / name).write_bytes(content)
                    flush_to_disk(draft / name)
                flush_to_disk(draft)
                shutil.rmtree(target, ignore_errors=True)  # damaged leftovers: a whole cell is never written twice
                draft.rename(target)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            flush_to_disk(target.parent)
        cell = self._known[replica] = Cell(target, record)
        vars(cell).update(history=history, sketches=(state["sketch_steps"], state["sketches"]))  # as it would read them
        return cell

    def write_history(self, history: pd.DataFrame) -> None:
        """`history.parquet`: the measurements of all cells in one table."""
        write_whole(self.path / "history.parquet", parquet_bytes(history))

    def export_checkpoints(self, cells: Sequence[Cell]) -> None:
        """`checkpoints/<arm>/s<seed>.pt`: plain state_dicts, rebuilt where they are not those of the cells."""
        for cell in cells:
            target = self.path / "checkpoints" / cell.record.arm / f"s{cell.record.seed}.pt"
            source = cell.folder / "state.pt"
            if target.exists() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns:
                continue
            write_whole(target, torch_bytes(cell.weights))


def gaps(cell: Cell, reference: Cell | None) -> pd.DataFrame:
    """Distance to the reference of the same seed: of the weights over steps, of the yardsticks at the end.

    `gap/*_log10` holds the logarithm of what is not 0: MLflow shows 1e-9 as 0.00.
    """
    rows: list[tuple[str, int, float]] = []
    if reference is not None:
        steps, _ = cell.sketches
        rows = [("gap/parameters", step, distance) for step, distance in cell.distances_from(reference)]
        for metric in measured_in([cell.metrics]):
            gap = abs(cell.metrics[f"test/{metric}"] - reference.metrics[f"test/{metric}"])
            rows.append((f"gap/{metric}", steps[-1], gap))
        rows += [(f"{metric}_log10", step, math.log10(gap)) for metric, step, gap in rows if gap > 0]
    metrics, at, values = zip(*rows, strict=True) if rows else ((), (), ())
    columns = {"metric": list(metrics), "step": np.array(at, np.int64), "value": np.array(values, np.float64)}
    return pd.DataFrame(columns).astype({"metric": "str"})
