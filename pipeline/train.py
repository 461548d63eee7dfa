"""Entry point: train losses side by side and print a verdict.

python -m pipeline.train 'loss=[nll,ce,kl]' 'seed=[0,1,2]' dataset=digits model=mlp
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline.config import schema as conf
from pipeline.config.hydra_glue import folder_of, is_multirun, run_entry_point
from pipeline.config.validate import validate
from pipeline.entry import ExitCode, gc_paused_import, record_exit_code, run_action, run_and_report


@hydra.main(version_base="1.3", config_path=str(conf.CONF), config_name="train")
def task(cfg: DictConfig) -> dict[str, Any]:
    """Run one trial; store its exit code here or, in a sweep, return it to the sweeper."""
    settings = HydraConfig.get()
    if not is_multirun(settings):
        record_exit_code(run_and_report(lambda: _train(cfg, settings)))
        return {}
    outcome = run_action(lambda: _train(cfg, settings))
    if outcome.code is ExitCode.USAGE:
        with suppress(OSError):  # a folder that is not empty existed before
            Path(settings.runtime.output_dir).rmdir()
    return {"exit_code": int(outcome.code), "summary": outcome.error or ""}


def _train(cfg: DictConfig, settings: HydraConf) -> ExitCode:
    with gc_paused_import("torch"):
        validate(cfg)
        from pipeline.trial.run import run

    return run(conf.plain(cfg), folder_of(settings), _command(settings))


def _command(settings: HydraConf) -> str:
    """Return the command line that repeats this trial."""
    sources = settings.runtime.config_sources
    config_dirs = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    overrides = [override for override in settings.overrides.task if not override.startswith("share=")]
    folder = [override for override in settings.overrides.hydra if override.startswith("hydra.run.dir=")]
    return shlex.join(["python", "-m", "pipeline.train", *config_dirs, *overrides, *folder])


def main() -> None:
    """Console script."""
    run_entry_point(task)


if __name__ == "__main__":
    # Import by name, so that launchers that pickle the task find it in this package in their workers.
    from pipeline.train import main as importable_main

    importable_main()
