"""Training the missing cells of a trial, tile by tile; every cell is on disk before the next tile begins."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from pipeline.cells import Cell, CellRecord, TrialFolder
from pipeline.module import SideBySide, fit
from pipeline.objectives import Objectives, Replica
from pipeline.resume import Partial
from pipeline.setting import Setting


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a `state_dict`."""
    sha = hashlib.sha256()
    for name, tensor in weights.items():
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def tiles(missing: Sequence[Replica], arms: Sequence[str], size: int) -> list[list[Replica]]:
    """The missing cells in groups of at most `size`, sorted by arm; a seed's arms stay together where they fit."""
    by_seed: dict[int, list[Replica]] = {}
    for replica in sorted(missing, key=lambda r: (r.seed, arms.index(r.arm))):
        by_seed.setdefault(replica.seed, []).append(replica)
    groups: list[list[Replica]] = []
    for replicas in by_seed.values():
        for part in (replicas[i : i + size] for i in range(0, len(replicas), size)):
            if groups and len(groups[-1]) + len(part) <= size:
                groups[-1] += part
            else:
                groups.append(part)
    return [sorted(group, key=lambda r: (arms.index(r.arm), r.seed)) for group in groups]


def train_tile(
    setting: Setting, replicas: list[Replica], folder: TrialFolder, callbacks: Sequence[pl.Callback] = ()
) -> list[Cell]:
    """Train these replicas as one stack, from where they were interrupted, and write the cells that are missing."""
    present = [f for f in setting.formulations if any(replica.arm == f.name for replica in replicas)]
    objectives = Objectives(
        present, replicas, setting.data.num_classes, setting.device, setting.dtype, setting.recipe.variation
    )
    module = SideBySide(
        setting.stack(replicas),
        objectives,
        replicas,
        setting.data,
        setting.builder.input_shape,
        setting.recipe,
    )
    initial = [weights_sha256(module.stack.weights(slot)) for slot in range(len(replicas))]
    partial = Partial(folder.path, setting, replicas)
    partial.give_back(module)
    _quiet_lightning()
    fit(module, [*callbacks, partial], "gpu" if setting.device.type == "cuda" else "cpu")
    missing, _ = folder.sort_out({replica: setting.fingerprint(replica) for replica in replicas})
    cells = [
        folder.write(record, *numbers)
        for record, *numbers in _results(module, setting, partial.started, initial)
        if Replica(record.arm, record.seed) in missing
    ]
    partial.remove()
    return cells


def _results(
    module: SideBySide, setting: Setting, started: float, initial: Sequence[str]
) -> Iterator[tuple[CellRecord, Any, dict[str, Any]]]:
    for slot, (replica, divergence) in enumerate(zip(module.replicas, module.divergences(), strict=True)):
        weights = {name: tensor.cpu() for name, tensor in module.stack.weights(slot).items()}
        record = CellRecord(
            arm=replica.arm,
            seed=replica.seed,
            fingerprint=setting.fingerprint(replica),
            made_from=setting.fingerprint_parts(replica.arm),
            environment=dict(setting.environment),
            engine=f"{setting.engine} ({setting.engine_reason})",
            initial_sha256=initial[slot],
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
            {
                "weights": weights,
                "sketch_steps": module.snapshots,
                "sketches": sketches,
                "batches": module.batches(slot),
            },
        )


@functools.cache
def _quiet_lightning() -> None:
    """Once a process: Lightning's notices say nothing that the pipeline does not say itself."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    # Lightning 2.6 uses a class that torch 2.14 has deprecated; nothing here can change that.
    warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
