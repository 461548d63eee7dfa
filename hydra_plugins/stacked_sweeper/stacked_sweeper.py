"""Hydra sweeper that trains swept losses and seeds together in one job; every other sweep makes jobs.

`-m model=mlp,cnn loss=nll,ce 'seed=range(3)'` launches `model=mlp loss=[nll,ce] seed=[0,1,2]` and the same for `cnn`,
through any launcher. A choice of lists is an ordinary sweep: `seed=[0],[1]` makes two jobs. `hydra/sweeper=basic`
makes a job of every combination.

`replicas_per_job` splits a large job into parts that work in one folder at the same time. Each part gets its `share`
of the seeds. One more job, with an empty share, writes the verdict.

Hydra executes a plugin before the module can be found by its name. Its dataclasses cannot have postponed annotations,
so this file has no `from __future__ import annotations`.
"""

import itertools
import math
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import get_method
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from likelihood_lab.errors import UsageError
from pipeline import entry as exit_codes
from pipeline.config.hydra_glue import hydra_errors_as_usage_errors, in_one_line
from pipeline.entry import ExitCode
from pipeline.storage.files import write_json

Job = tuple[str, ...]  # the overrides of one job
CONCLUDING = "share=[]"


@dataclass
class StackedSweeperConf:
    """Settings of `hydra.sweeper`."""

    _target_: str = "hydra_plugins.stacked_sweeper.stacked_sweeper.StackedSweeper"
    stack: list[str] = field(default_factory=lambda: ["loss", "seed"])  # axes whose values share a job
    replicas_per_job: int | None = None  # larger jobs are split along the last axis
    max_batch_size: int | None = None  # jobs per call of the launcher
    check: str = "pipeline.config.validate.validate"  # called with each configuration first
    params: dict[str, str] = field(default_factory=dict)  # a sweep in a file; the command line wins


ConfigStore.instance().store(group="hydra/sweeper", name="stacked", node=StackedSweeperConf)


@dataclass
class Record:
    """One job in `sweep.json`. Its status is `done`, `failed`, or `unknown` if it returned nothing (yet)."""

    overrides: Job
    dir: str | None = None
    status: str = "unknown"
    exit_code: int | None = None
    error: str | None = None


class StackedSweeper(Sweeper):
    """Sweeper that makes lists, not jobs, along the axes of the stack. A failed job does not affect the others."""

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, **settings: Any) -> None:
        self.settings = StackedSweeperConf(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> list[Record]:
        """Check every job, launch all of them, and record their exit codes."""
        with hydra_errors_as_usage_errors():
            parts = {job: self.checked(job) for job in self.jobs(arguments)}
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        records = self.launched([part for job in parts for part in parts[job]], [])
        refused = {record.overrides for record in records if record.exit_code == ExitCode.USAGE}
        shared = [job for job in parts if len(parts[job]) > 1]
        shares = {part for job in shared for part in parts[job]}
        concluding = [(*job, CONCLUDING) for job in shared if not refused.issuperset(parts[job])]
        records = self.launched(concluding, records)
        for record in records:
            exit_codes.record_exit_code(ExitCode.BUG if record.exit_code is None else record.exit_code)
            line = f"{record.status}: {' '.join(record.overrides)}"
            if record.status != "done":
                print(f"{line}: {record.error}", file=sys.stderr)
            elif record.overrides not in shares:  # some launchers do not show what a job prints
                print(f"{line}: exit code {record.exit_code}, {record.dir}")
        if all(record.exit_code == ExitCode.USAGE for record in records):
            self.remove_folders(made)
        return records

    def launched(self, jobs: list[Job], before: list[Record]) -> list[Record]:
        """Launch the jobs in batches. Return the records in `before`, followed by the records of these jobs."""
        records = [*before, *map(Record, jobs)]
        self.save(records)
        size = self.settings.max_batch_size or max(1, len(jobs))
        for start in range(len(before), len(records), size):
            batch = slice(start, start + size)
            records[batch] = self.launch([record.overrides for record in records[batch]], start)
            self.save(records)
        return records

    def jobs(self, arguments: list[str]) -> list[Job]:
        """Return every combination of the swept values, without duplicates. The last setting of a key counts."""
        for name in ("replicas_per_job", "max_batch_size"):
            if (limit := getattr(self.settings, name)) is not None and limit < 1:
                raise UsageError(f"hydra.sweeper.{name}={limit}: give an integer >= 1, or null for no limit")
        lines = [f"{key}={value}" for key, value in self.settings.params.items()] + arguments
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        choices = {}
        for override in parser.parse_overrides(lines):
            key = override.get_key_element()
            choices[self.axis(key) or key] = self.choices(override)
        return list(dict.fromkeys(itertools.product(*choices.values())))

    def axis(self, key: str) -> str | None:
        """Return the axis of the stack that an override's key (`seed`, `++seed`) sets, or None."""
        return name if (name := key.lstrip("+")) in self.settings.stack else None

    def choices(self, override: Override) -> list[str]:
        """Return one override per swept value, or one with the list of all values for an axis of the stack."""
        key, line = override.get_key_element(), str(override.input_line)
        if (axis := self.axis(key)) and override.is_add():
            raise UsageError(f"{line}: {axis} cannot be added to; name every value in {axis}=VALUE,VALUE")
        if not override.is_sweep_override():
            return [line]
        values = swept_values(override)
        texts = [Transformer.str(value) for value in values]
        if axis is None or any(isinstance(value, list) for value in values):
            return [f"{key}={text}" for text in texts]
        if repeated := [text for text in dict.fromkeys(texts) if texts.count(text) > 1]:
            raise UsageError(f"{line} repeats {', '.join(repeated)}: name each value once")
        return [f"{key}=[{','.join(texts)}]"]

    def checked(self, job: Job) -> list[Job]:
        """Check the configuration of a job and return the job, in parts if it is too large."""
        composed = self.composed(job)
        if composed.hydra.sweeper != self.config.hydra.sweeper:
            raise UsageError(f"{' '.join(job)} brings its own hydra.sweeper settings: run it by itself")
        get_method(self.settings.check)(composed)
        return self.parts(job, composed, self.settings.replicas_per_job)

    def composed(self, job: Job, number: int = 0) -> DictConfig:
        """Return the configuration of a job; `${hydra:...}` resolves as in the job itself."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
        with open_dict(composed):
            composed.hydra.job.num = number
        HydraConfig.instance().set_config(composed)
        return composed

    def parts(self, job: Job, config: DictConfig, limit: int | None) -> list[Job]:
        """Split a job along the last axis into parts of at most `limit` replicas, but at least one value."""
        *others, last = (OmegaConf.select(config, axis) for axis in self.settings.stack)
        if limit is None or not isinstance(last, ListConfig) or config.get("share") is not None:
            return [job]
        per_value = math.prod(len(values) for values in others if isinstance(values, DictConfig | ListConfig))
        size = max(1, limit // per_value)
        if len(last) <= size:
            return [job]
        texts = [Transformer.str(value) for value in last]
        shares = [texts[start : start + size] for start in range(0, len(texts), size)]
        parts = [(*job, f"share=[{','.join(share)}]") for share in shares]
        folders = {self.composed(part, i).hydra.sweep.subdir for i, part in enumerate((parts[0], (*job, CONCLUDING)))}
        if len(folders) > 1:
            raise UsageError(
                f"hydra.sweep.subdir gives the jobs that share a trial several folders ({', '.join(sorted(folders))}); "
                "leave it as it is, or leave hydra.sweeper.replicas_per_job out"
            )
        return parts

    def launch(self, jobs: list[Job], start: int) -> list[Record]:
        """Launch one batch. If the launcher fails, all jobs of the batch are `unknown`."""
        try:
            returns = self.launcher.launch(jobs, initial_job_idx=start)
        except Exception as error:  # a killed worker, a full disk: launchers raise any type
            return [Record(job, error=in_one_line(error)) for job in jobs]
        return [recorded(job, returned) for job, returned in zip(jobs, returns, strict=True)]

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    def save(self, records: list[Record]) -> None:
        """Write `sweep.json` atomically; the first time, before any job is launched."""
        jobs = {"jobs": [asdict(record) for record in records]}
        # Two sweeps may share the folder: the process id keeps their drafts apart.
        write_json(self.folder / "sweep.json", jobs, f".sweep.{os.getpid()}.json")

    def remove_folders(self, made: list[Path]) -> None:
        """Remove `sweep.json` and the folders `made` for a sweep of which every job was refused."""
        (self.folder / "sweep.json").unlink()
        for path in made:
            with suppress(OSError):  # a launcher's own files may be in it
                path.rmdir()


def swept_values(override: Override) -> list[Any]:
    """Return the values of one sweep, in their given order."""
    if not override.is_discrete_sweep():
        raise UsageError(f"{override.input_line}: an interval cannot be listed; give choices or a range")
    try:
        values = list(override.sweep_iterator())
    except ValueError as error:  # a range whose step is 0
        raise UsageError(f"{override.input_line}: {error}") from error
    if not values:
        raise UsageError(f"{override.input_line} stands for no value at all")
    return values


def recorded(job: Job, returned: JobReturn) -> Record:
    """Return the record of a job that returned a result or an exception."""
    folder = str(cast(DictConfig, returned.hydra_cfg).hydra.runtime.output_dir)
    try:
        result = returned.return_value
        code = ExitCode(result["exit_code"])
    except Exception as error:  # anything that the task function raised
        return Record(job, folder, "failed", ExitCode.BUG, in_one_line(error))
    if code in (ExitCode.HOLDS, ExitCode.REFUTED):
        return Record(job, folder, "done", code)
    return Record(job, folder, "failed", code, result.get("summary") or "see what the job printed")
