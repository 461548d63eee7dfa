"""Where the results of a request go: a folder that is made only once the request has been accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict


class LateFolder(Callback):
    """Keeps Hydra from making the folder for a request that is then refused.

    Hydra makes `hydra.run.dir` before it calls the task. It is told to stay where it is, and the task finds
    the folder that was asked for in `hydra.callbacks.late_folder.asked`.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        asked = OmegaConf.to_container(config.hydra.run, resolve=False)
        with open_dict(config.hydra.callbacks.late_folder):
            config.hydra.callbacks.late_folder.asked = asked["dir"]  # type: ignore[index, call-overload]
        config.hydra.run.dir = "."


def swept(settings: HydraConf) -> bool:
    """Whether the job at hand is one of several."""
    return settings.mode is not None and settings.mode.name == "MULTIRUN"


def folder_of(settings: HydraConf) -> Path:
    """The folder that was asked for: Hydra makes a swept job's, a single request makes its own."""
    late = settings.callbacks.get("late_folder")  # whoever takes it away has Hydra make the folder
    asked = settings.runtime.output_dir if swept(settings) or late is None else late["asked"]
    return Path(str(asked)).absolute()
