"""Training the missing cells of a trial, tile by tile; every cell is on disk before the next tile begins."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from pipeline.cells import Cell, CellRecord, TrialFolder
from pipeline.module import SideBySide, fit
from pipeline.objectives import Objectives, Replica
from pipeline.setting import Setting


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a `state_dict`."""
    sha = hashlib.sha256()
    for name, tensor in weights.items():
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def tiles(missing: Sequence[Replica], arms: Sequence[str], size: int) -> list[list[Replica]]:
    """The missing cells in groups of at most `size`, as even as can be; whole seeds together, sorted by arm."""
    by_seed = sorted(missing, key=lambda replica: (replica.seed, arms.index(replica.arm)))
    count = -(-len(by_seed) // size)
    if not count:
        return []
    return [
        sorted((by_seed[i] for i in chunk), key=lambda replica: arms.index(replica.arm))
        for chunk in np.array_split(np.arange(len(by_seed)), count)
    ]


def train_tile(
    setting: Setting, replicas: list[Replica], folder: TrialFolder, callbacks: Sequence[pl.Callback] = ()
) -> list[Cell]:
    """Train these replicas as one stack and write their cells."""
    started = time.time()
    present = [f for f in setting.formulations if any(replica.arm == f.name for replica in replicas)]
    objectives = Objectives(present, replicas, setting.data.num_classes, setting.device, setting.dtype)
    module = SideBySide(
        setting.stack(replicas),
        objectives,
        replicas,
        setting.data,
        setting.builder.input_shape,
        setting.recipe,
    )
    _quiet_lightning()
    fit(module, callbacks, "gpu" if setting.device.type == "cuda" else "cpu")
    return [folder.write(*cell) for cell in _results(module, setting, started)]


def _results(module: SideBySide, setting: Setting, started: float) -> Iterator[tuple[CellRecord, Any, dict[str, Any]]]:
    for slot, (replica, divergence) in enumerate(zip(module.replicas, module.divergences(), strict=True)):
        weights = {name: tensor.cpu() for name, tensor in module.stack.weights(slot).items()}
        record = CellRecord(
            arm=replica.arm,
            seed=replica.seed,
            fingerprint=setting.fingerprint(replica),
            made_from=setting.fingerprint_parts(replica.arm),
            environment=dict(setting.environment),
            engine=f"{setting.engine} ({setting.engine_reason})",
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
            {"weights": weights, "sketch_steps": module.snapshots, "sketches": sketches},
        )


@functools.cache
def _quiet_lightning() -> None:
    """Once a process: Lightning's notices say nothing that the pipeline does not say itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    # Lightning 2.6 uses a class that torch 2.14 has deprecated; nothing here can change that.
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
