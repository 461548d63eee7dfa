"""Whole trials for tests: composed, run in this process, and what they left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.config import schema as conf
from pipeline.config.validate import validate
from pipeline.entry import ExitCode
from pipeline.replica import Replica
from pipeline.storage.cells import TrialFolder
from pipeline.trial.run import run

FAST = ("tracking=none", "trainer=cpu", "epochs=2", "model.hidden=[16]", "audit=false", "controls=none")


def compose(*overrides: str) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        cfg = hydra_compose("train", overrides=[*FAST, *overrides])
    validate(cfg)
    return conf.plain(cfg)


def trial(path: Path, *overrides: str) -> ExitCode:
    return run(compose(*overrides), path, "the command")


def weights(path: Path, arm: str, seed: int) -> dict[str, torch.Tensor]:
    cell = TrialFolder(path).read(Replica(arm, seed))
    assert cell is not None, f"{arm}/s{seed} is missing"
    return cell.weights


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def verdict(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "verdict.json").read_text())
    return found


def words(path: Path) -> dict[str, str]:
    return {entry["loss"]: entry["verdict"] for entry in verdict(path)["comparisons"]}
