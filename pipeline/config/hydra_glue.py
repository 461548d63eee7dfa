"""Everything about Hydra: its errors as one line, the output folder made late, and the wrapper of an entry point."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from likelihood_lab.errors import UsageError, did_you_mean
from pipeline.entry import ExitCode, noted, run_and_report, worst_exit_code

DEFAULTS_LIST = "hydra._internal.defaults_list"  # the module that reads which files are chosen
NO_OPTION = "a group cannot be null or a number; give the name of one of its files, or leave it out"


def run_entry_point(main: Callable[[], object]) -> None:
    """Call a Hydra entry point and exit with the worst exit code of its jobs.

    Hydra turns every error into exit code 1 unless it is asked for the full error. Here a configuration that does not
    compose is a wrong request (exit code 2).
    """

    def compose_and_run() -> ExitCode:
        with hydra_errors_as_usage_errors():
            main()
        return worst_exit_code()

    os.environ["HYDRA_FULL_ERROR"] = "1"
    noted.clear()
    try:
        code = run_and_report(compose_and_run)
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, the same command continues", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    sys.exit(code)


@contextmanager
def hydra_errors_as_usage_errors() -> Iterator[None]:
    """Turn Hydra's errors about the request into `UsageError`; let any other error pass."""
    try:
        yield
    except Exception as error:
        if not _blames_the_request(error):
            raise
        raise UsageError(in_one_line(error)) from error


def _blames_the_request(error: Exception) -> bool:
    """Whether an error is Hydra's own kind, or a plain one that Hydra raised."""
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    origin = "" if trace is None else str(trace.tb_frame.f_globals["__name__"])
    return (isinstance(error, ValueError | ImportError) and origin.startswith("hydra.")) or origin == DEFAULTS_LIST


def in_one_line(error: BaseException) -> str:
    """Return the message of an exception in one line, with the cause of a Hydra error."""
    match error:
        case MissingConfigException(missing_cfg_file=str(path)) if "/" in path:
            return _unknown_option(error, *path.rsplit("/", 1))
        case OverrideParseException():
            said = error.message.splitlines()[0]
            return f"cannot read {error.override!r}: {said}; give KEY=VALUE, quoted for the shell"
        case ConfigCompositionException() if sweep := _sweep_without_multirun(str(error)):
            return sweep
        case ConfigCompositionException(__cause__=OmegaConfBaseException() as cause) if _of_override(error):
            return in_one_line(cause)
        case HydraException():
            return _with_cause(error)
        case ConfigAttributeError() | ConfigKeyError() if error.parent_node is not None:
            return _unknown_key(error)
        case OmegaConfBaseException():
            message = str(error).partition("\n")[0]
            if message == "Cannot merge DictConfig with ListConfig":  # either way round
                message = "a list is given where a mapping is wanted, or a mapping where a list is"
            return f"{error.full_key}: {message}" if error.full_key else message
        case ValueError() if "Config group override" in str(error):  # GROUP=null, GROUP=3
            return NO_OPTION
        case TypeError() | AttributeError():  # GROUP=[null]
            return NO_OPTION
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _with_cause(error: BaseException) -> str:
    message = " ".join(str(error).partition("Config search path:")[0].split())
    return "; ".join(part for part in (message, error.__cause__ and in_one_line(error.__cause__)) if part)


def _unknown_option(error: MissingConfigException, group: str, name: str) -> str:
    """Return a line with the options. Hydra itself lists them for a single choice only, not for a list."""
    options = sorted(error.options or _options_in(group, str(error)))
    return f"{group}={name}: no such option; there is {', '.join(options)}{did_you_mean(name, options)}"


def _options_in(group: str, message: str) -> set[str]:
    """Return the files of a group in the folders that Hydra's message names."""
    folders = (Path(path) for path in re.findall(r"path=file://(.+)", message))
    return {file.stem for folder in folders for file in (folder / group).glob("*.yaml")}


def _of_override(error: BaseException) -> bool:
    return str(error).startswith(("Could not override", "Error merging override"))


PROTOCOL_KEYS = ("alpha", "looks", "max_seeds", "controls", "vary")  # top-level keys of earlier versions
INTERNAL_KEYS = ("share",)  # set by the sweeper; no message offers them
REMOVED_KEYS = {
    "until": "seeds are added where protocol.max_seeds is set, for example protocol.max_seeds=40 protocol.looks=2",
    "rank_test": "the test is a function of the library, likelihood_lab.stats.trajectory.rank_test",
}


def moved_key(key: str) -> str | None:
    """Return a line with the new name of a key of an earlier version; None for any other key."""
    if key in PROTOCOL_KEYS:
        return f"the key '{key}' is now protocol.{key}"
    return f"the key '{key}' is gone: {REMOVED_KEYS[key]}" if key in REMOVED_KEYS else None


def _unknown_key(error: OmegaConfBaseException) -> str:
    if line := moved_key(str(error.full_key)):
        return line
    parent, _, key = str(error.full_key).rpartition(".")
    known = [str(name) for name in error.parent_node if name not in ("hydra", *INTERNAL_KEYS)]
    takes = f"{parent} takes" if parent else "the keys are"
    return f"unknown key '{error.full_key}'{did_you_mean(key, known)}; {takes}: {', '.join(known)}"


def _sweep_without_multirun(message: str) -> str | None:
    if "--multirun" not in message:
        return None
    found = re.search(r"'(\w+)=(.+)'", message.partition("\n")[0])
    key, values = found.groups() if found else ("seed", "range(3)")
    listed = values if re.fullmatch(r"[\w.,-]+", values) else "0,1,2"
    return f"{key}={values} is a sweep: add -m, or give a list such as '{key}=[{listed}]'"


class DeferredOutputDir(Callback):
    """Callback that stops Hydra from creating the output folder of a request that is later refused.

    Hydra creates `hydra.run.dir` before it calls the task. The callback sets that key to the current folder and stores
    the requested folder in `hydra.callbacks.deferred_output_dir.asked`, where the task reads it.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        asked = OmegaConf.to_container(config.hydra.run, resolve=False)
        with open_dict(config.hydra.callbacks.deferred_output_dir):
            config.hydra.callbacks.deferred_output_dir.asked = asked["dir"]  # type: ignore[index, call-overload]
        config.hydra.run.dir = "."


def is_multirun(settings: HydraConf) -> bool:
    """Whether this job is one of a multirun."""
    return settings.mode is not None and settings.mode.name == "MULTIRUN"


def folder_of(settings: HydraConf) -> Path:
    """Return the output folder.

    In a multirun, Hydra creates it for each job. In a single run, the pipeline creates it.
    """
    deferred = settings.callbacks.get("deferred_output_dir")  # None if the user removed it: Hydra created the folder
    folder = settings.runtime.output_dir if is_multirun(settings) or deferred is None else deferred["asked"]
    return Path(str(folder)).absolute()
