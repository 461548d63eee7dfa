"""Entry point: train formulations side by side and print a verdict.

python -m pipeline.train 'loss=[nll,ce,kl]' 'seed=[0,1,2]' dataset=digits model=mlp
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from pipeline import config as conf
from pipeline.exit_codes import ExitCode, guarded, note, run_entry_point


@hydra.main(version_base="1.3", config_path=str(conf.CONF), config_name="train")
def task(cfg: DictConfig) -> dict[str, Any]:
    """One trial; its own errors become an exit code, so that a sweep goes on."""
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    swept = settings.mode is not None and settings.mode.name == "MULTIRUN"

    def trial() -> ExitCode:
        conf.check(cfg, settings.runtime.choices)
        from pipeline.trial import run

        command = shlex.join(["python", "-m", "pipeline.train", *settings.overrides.task])
        return run(conf.plain(cfg), folder, command)

    code = guarded(trial)
    if not swept:
        note(code)
    return {"exit_code": int(code), "folder": str(folder)}


def main() -> None:
    """Console script."""
    run_entry_point(task)


if __name__ == "__main__":
    # Imported by name, so that launchers that pickle the task find it in this package in their workers.
    from pipeline.train import main as importable_main

    importable_main()
