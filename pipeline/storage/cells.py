"""Folder of a trial: read, verify and write its cells.

trial.yaml                      identity of the trial; another configuration is refused
cells/<arm>/s<seed>/            one run: config.yaml, history.parquet, state.pt; the source of truth
controls/<arm>/s<seed>/         the same for replay, placebos and positive control
partial/<digest>.pt             checkpoint of a tile whose training was killed
tile                            number of replicas that fit at once, after more ran out of memory
stale/<arm>/s<seed>-<digest>/   cells that are damaged, or made by other code, data or environment
verdict.json report.html figures/ checkpoints/    written from the cells
"""

from __future__ import annotations

import hashlib
import io
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
from pipeline.storage.files import flush_to_disk, read_yaml, refusing_disk_errors, sha256, write_whole, yaml_bytes

SEALED = ("history.parquet", "state.pt")  # files of a cell whose SHA-256 is in its config.yaml
SEAL = b"# SHA-256 of the lines above: "  # begins the last line of config.yaml
UNSEALED = re.compile(rb"\n  state\.pt: [0-9a-f]{64}\n\Z")  # end of config.yaml in versions without a seal
OUTDATED = "made by other code, settings, data or environment"


class DamagedCellError(Exception):
    """Cell that cannot be used; the text names the fault in a few words."""


@dataclass(frozen=True)
class CellRecord:
    """Content of a cell's `config.yaml`: all facts about the run but its measurements and weights."""

    arm: str
    seed: int
    fingerprint: str
    made_from: dict[str, Any]  # content of the fingerprint
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
    """Result of one run, read by `load_verified_cell`."""

    folder: Path
    record: CellRecord

    @cached_property
    def history(self) -> pd.DataFrame:
        """Measurements: columns metric, step, value."""
        return pd.read_parquet(self.folder / "history.parquet")

    @property
    def weights(self) -> dict[str, Tensor]:
        """The plain module's `state_dict`; read again at every call, since all weights may not fit into memory."""
        weights: dict[str, Tensor] = self._state()["weights"]
        return weights

    @cached_property
    def sketches(self) -> tuple[list[int], Tensor]:
        """Steps, and the sketches of the weights at these steps, [steps, width]."""
        state = self._state()
        return state["sketch_steps"], state["sketches"]

    def distances_from(self, reference: Cell) -> list[tuple[int, float]]:
        """Return (step, relative distance of the weights) at each snapshot; empty if the snapshots do not match."""
        (steps, mine), (others, theirs) = self.sketches, reference.sketches
        if steps != others or mine.shape != theirs.shape:
            return []
        return list(zip(steps, sketch_distance(mine, theirs).tolist(), strict=True))

    @property
    def batches(self) -> list[dict[str, Any]]:
        """Logits [B, C], labels [B] and soft target_probs [B, C] of the loss at a few steps; empty in old cells."""
        batches: list[dict[str, Any]] = self._state().get("batches", [])
        return batches

    def _state(self) -> dict[str, Any]:
        path = self.folder / "state.pt"
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            line = f"{path} holds more than weights and was not read, since reading it would run code; delete its cell"
            raise UsageError(line) from error
        return state

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Last value of every metric that is not NaN; NaN if all are."""
        history = zip(self.history["metric"].tolist(), self.history["value"].tolist(), strict=True)
        rows = [(metric, value) for metric, value in history if metric != "train/objective"]
        return {metric: math.nan for metric, _ in rows} | {metric: value for metric, value in rows if value == value}


def load_verified_cell(folder: Path) -> Cell:
    """Return the cell in a folder after comparing every file with its checksum.

    Raises:
        DamagedCellError: a file is missing, cut short or changed, or the folder is a copy of another cell's.
    """
    record = _read_record(folder / "config.yaml")
    own = f"{record.arm}/s{record.seed}"
    if own != f"{folder.parent.name}/{folder.name}":
        raise DamagedCellError(f"it is a copy of {own}")
    for name in SEALED:
        with _damaged_if_unreadable(folder / name), (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.files.get(name):
                raise DamagedCellError(f"{name} is not as it was written")
    return Cell(folder, record)


def _read_record(path: Path) -> CellRecord:
    with _damaged_if_unreadable(path):
        content = path.read_bytes()
    text, separator, seal = content.rpartition(SEAL)
    if not separator and UNSEALED.search(content):
        raise DamagedCellError(f"{path.name} bears no seal: an older version wrote it")
    if sha256(text) != seal.decode(errors="replace").strip():
        raise DamagedCellError(f"{path.name} is not as it was written")
    try:
        return CellRecord(**yaml.load(text, Loader=yaml.CSafeLoader))
    except TypeError as error:
        raise DamagedCellError(f"{path.name} was written by another version") from error


@contextmanager
def _damaged_if_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedCellError(f"{path.name} is missing") from error
    except OSError as error:
        raise DamagedCellError(f"{path.name} cannot be read ({error.strerror})") from error


class TrialFolder:
    """Folder of one trial. A lock guards its shared files, another lock the cells of each seed."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))  # MLflow runs are found by the folder's name, and `.` has none
        self._lock = filelock.FileLock(self.path / ".lock")
        self._cells: dict[Replica, Cell] = {}  # cells that this process wrote or read
        self.damaged: dict[Replica, str] = {}  # faults of the cells that it could not read

    @contextmanager
    def locked(self, *, patiently: bool = False) -> Iterator[None]:
        """Hold the lock of the folder, which is created if absent; refuse if another process holds it.

        Args:
            patiently: wait for the other process instead.
        """
        new = not self.path.exists()
        with refusing_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._acquire(self._lock, patiently)
        try:
            yield
        finally:
            self._lock.release()
            if new and [entry.name for entry in self.path.iterdir()] == [".lock"]:  # the request was refused
                shutil.rmtree(self.path, ignore_errors=True)

    def release_lock(self) -> None:
        """Release the lock of the folder, so that other jobs can train the cells of their own seeds."""
        self._lock.release()

    @contextmanager
    def training(self, seeds: Sequence[int]) -> Iterator[None]:
        """Hold the locks of these seeds' cells; refuse if another process holds one of them."""
        with ExitStack() as locks:
            for seed in seeds:
                lock = filelock.FileLock(self.path / ".training" / f"s{seed}")
                with refusing_disk_errors(self.path):
                    Path(lock.lock_file).parent.mkdir(exist_ok=True)
                self._acquire(lock)
                locks.callback(lock.release)
            yield

    def _acquire(self, lock: filelock.BaseFileLock, patiently: bool = False) -> None:
        with refusing_disk_errors(self.path):
            try:
                lock.acquire(blocking=patiently)
            except filelock.Timeout as error:
                line = f"{self.path} is in use by another process; wait for it or choose another folder"
                raise UsageError(line) from error

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        """Write `trial.yaml`, the identity of the trial."""
        self.check_identity(identity)
        write_whole(self.path / "trial.yaml", yaml_bytes(dict(identity)))

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise an error if trial.yaml has another identity, or if the folder has cells but no trial.yaml."""
        if not (self.path / "trial.yaml").exists():
            if (self.path / "cells").exists():
                raise UsageError(f"{self.path} holds cells but no trial.yaml: it is no trial's folder; choose another")
            return
        written = read_yaml(self.path / "trial.yaml")
        if differing := sorted(key for key in {*written, *identity} if written.get(key) != identity.get(key)):
            raise UsageError(
                f"{self.path} holds a trial with another {', '.join(differing)}; choose another folder "
                "(hydra.run.dir=DIR) or give the configuration that it was made with"
            )

    @property
    def tile(self) -> int | None:
        """Number of replicas that fit at once, if more ran out of memory here."""
        try:
            return int((self.path / "tile").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def remember_tile(self, size: int) -> None:
        """Write the number of replicas that fit at once, for the next call of the same command."""
        with self.locked(patiently=True):
            write_whole(self.path / "tile", f"{size}\n".encode())

    def cell_path(self, replica: Replica) -> Path:
        """Return the folder of a run's cell."""
        kind = "controls" if is_control(replica.arm) else "cells"
        return self.path / kind / replica.arm / f"s{replica.seed}"

    def read(self, replica: Replica) -> Cell | None:
        """Return the cell; None if it is absent or damaged. `damaged` then holds the fault."""
        folder = self.cell_path(replica)
        if os.path.lexists(folder) and replica not in self._cells and replica not in self.damaged:
            try:
                self._cells[replica] = load_verified_cell(folder)
            except DamagedCellError as error:
                self.damaged[replica] = str(error)
        return self._cells.get(replica)

    def cells(self, kind: str = "cells") -> list[Cell]:
        """Return all cells (or all `controls`), ordered by arm and seed."""
        folders = [path for path in self.path.glob(f"{kind}/*/s*") if path.name[1:].isdecimal()]
        order = sorted((path.parent.name, int(path.name[1:])) for path in folders)
        return [cell for arm, seed in order if (cell := self.read(Replica(arm, seed))) is not None]

    def find_missing(self, wanted: Mapping[Replica, str]) -> tuple[list[Replica], dict[Replica, str]]:
        """Return the missing runs, and the reason for each damaged or outdated cell, which moves to `stale/`.

        A cell is outdated if its fingerprint differs: other code, data or environment made it.
        """
        missing, moved = [], {}
        for replica, fingerprint in wanted.items():
            cell = self.read(replica)
            if cell is not None and cell.record.fingerprint == fingerprint:
                continue
            missing.append(replica)
            if cell is not None:
                moved[replica] = OUTDATED
                self._move_to_stale(replica, cell.record.fingerprint[:12])
            elif replica in self.damaged:
                moved[replica] = self.damaged[replica]
                self._move_to_stale(replica, "damaged")
        return missing, moved

    def _move_to_stale(self, replica: Replica, suffix: str) -> None:
        target = self.path / "stale" / replica.arm / f"s{replica.seed}-{suffix}"
        self._cells.pop(replica, None)
        self.damaged.pop(replica, None)
        with refusing_disk_errors(self.path):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            self.cell_path(replica).rename(target)

    def write(self, record: CellRecord, history: pd.DataFrame, state: Mapping[str, Any]) -> Cell:
        """Write a cell into a draft folder, then rename it into place."""
        replica = Replica(record.arm, record.seed)
        target = self.cell_path(replica)
        draft = target.with_name(f".{target.name}-draft")
        contents = {"history.parquet": _parquet_bytes(history), "state.pt": _torch_bytes(state)}
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
                shutil.rmtree(target, ignore_errors=True)  # only a damaged cell can be here
                draft.rename(target)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            flush_to_disk(target.parent)
        cell = self._cells[replica] = Cell(target, record)
        vars(cell).update(history=history, sketches=(state["sketch_steps"], state["sketches"]))  # saves reading them
        return cell

    def write_history(self, history: pd.DataFrame) -> None:
        """Write `history.parquet`, the measurements of all cells in one table."""
        write_whole(self.path / "history.parquet", _parquet_bytes(history))

    def export_checkpoints(self, cells: Sequence[Cell]) -> None:
        """Write `checkpoints/<arm>/s<seed>.pt`, plain state_dicts, unless they are newer than their cells."""
        for cell in cells:
            target = self.path / "checkpoints" / cell.record.arm / f"s{cell.record.seed}.pt"
            source = cell.folder / "state.pt"
            if target.exists() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns:
                continue
            write_whole(target, _torch_bytes(cell.weights))


def _parquet_bytes(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _torch_bytes(state: Mapping[str, Any]) -> bytes:
    """Serialise in memory with `torch.save`, which may crash the process if it writes to a full disk."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def gaps(cell: Cell, reference: Cell | None) -> pd.DataFrame:
    """Return the distance to the reference of the same seed: weights at each snapshot, metrics at the end.

    `gap/*_log10` is the logarithm of a distance above 0, since MLflow shows 1e-9 as 0.00.
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
