"""A small Hydra application that writes down the configuration that it receives."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from likelihood_lab.errors import UsageError


@dataclass
class Loss:
    weight: float = 1.0


@dataclass
class Model:
    hidden: int = 8


@dataclass
class Miniature:
    loss: dict[str, Loss] = field(default_factory=dict)
    model: Model = field(default_factory=Model)
    seed: Any = 0
    share: Any = None
    epochs: int = 1
    exit_code: int = 0
    accident: str | None = None
    note: str | None = None
    option: str = "${hydra:runtime.choices.model}"


ConfigStore.instance().store(name="miniature", node=Miniature)


def check(cfg: DictConfig) -> None:
    """Refuse wrong seeds and models."""
    seeds = cfg.seed if isinstance(cfg.seed, ListConfig) else [cfg.seed]
    if any(type(seed) is not int or seed < 0 for seed in seeds):
        raise UsageError(f"seed={list(seeds)}: give integers >= 0")
    if cfg.option not in ("mlp", "cnn"):
        raise UsageError(f"{cfg.option} is not a model")


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Write the configuration, then finish, raise or kill the process."""
    folder = HydraConfig.get().runtime.output_dir
    Path(folder, "received.json").write_text(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    if cfg.accident == "raise":
        raise RuntimeError("the bench\nis on fire")
    if cfg.accident == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"exit_code": cfg.exit_code, "folder": folder, "summary": f"ended with {cfg.exit_code}"}


if __name__ == "__main__":
    main()
