"""Memory and disk that a trial needs, computed before it starts: its tile is reduced to fit, or it is refused.

A replica in training needs, in bytes:

    parameters x (2 + states)   the weights, their gradient, and the numbers that the optimizer keeps for each weight
    + 2 x saved                 the tensors that the forward pass saves for the backward pass, and as much in gradients
    + buffers

A stack needs that for each replica of its tile, and the data. On disk a run takes its weights twice, in its cell and as
a checkpoint, and about 140 kB of history, sketches and logits.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from likelihood_lab.errors import UsageError
from pipeline.text import in_words
from pipeline.trial.setup import TrialSetup

HISTORY_BYTES = 140_000
USABLE = 0.7  # share of the memory; measured use over this formula: 1.4 for ResNet-18, 0.9 for MLPs
PROBED = (2, 4)  # rows of two batches; their difference gives the bytes of one row


@dataclass(frozen=True)
class Budget:
    """Bytes of one replica in training, of the data, of the memory (machine or GPU), and of one run on disk."""

    replica: int
    data: int
    machine: int
    run: int

    def of(self, tile: int) -> int:
        """Return the memory of a stack of `tile` replicas, with the data."""
        return self.data + tile * self.replica


def budget_of(setup: TrialSetup) -> Budget:
    """Compute the budget from one plain module and two batches of a few rows."""
    module = setup.builder(0).to(setup.device, setup.dtype).train()
    weights = sum(_bytes(module.parameters()))
    states = _states(setup.recipe.make_optimizer)
    kept = _kept(module, setup.builder.input_shape, setup.recipe.batch_size)
    buffers = sum(_bytes(module.buffers()))
    data = setup.data
    return Budget(
        replica=weights * (2 + states) + 2 * kept + buffers,
        data=sum(_bytes({id(tensor): tensor for tensor in (data.images, data.pool)}.values())),
        machine=_memory(setup.device),
        run=2 * (weights + buffers) + HISTORY_BYTES,
    )


def shrink_tile_to_memory(setup: TrialSetup) -> TrialSetup:
    """Return the setup with its tile halved until a stack fits into memory.

    Raises:
        UsageError: not even one run fits.
    """
    budget, tile = budget_of(setup), setup.tile
    usable = int(USABLE * budget.machine)
    while tile > 1 and budget.of(tile) > usable:
        tile //= 2
    if budget.of(tile) > usable:
        raise UsageError(
            f"one run of {setup.builder.name} at batch_size={setup.recipe.batch_size} takes about "
            f"{in_words(budget.of(1))} of memory, and {in_words(usable)} of {in_words(budget.machine)} may be used; "
            "lower batch_size, or choose a smaller model or pictures"
        )
    return setup if tile == setup.tile else replace(setup, tile=tile)


def check_disk(budget: Budget, missing: int, folder: Path) -> None:
    """Raise `UsageError` if the missing runs would fill the disk."""
    needed, free = missing * budget.run, shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"{missing} runs take about {in_words(needed)} on disk, and {folder} has {in_words(free)} left; "
            "free space or choose another folder (hydra.run.dir=DIR), or train fewer seeds"
        )


def _bytes(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


def _states(make_optimizer: Callable[..., torch.optim.Optimizer]) -> int:
    """Return how many numbers an optimizer keeps for each weight."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight].values()
    return len([value for value in state if isinstance(value, Tensor) and value.shape == weight.shape])


def _kept(module: nn.Module, shape: tuple[int, ...], batch_size: int) -> int:
    """Return the bytes that the backward pass needs of a batch, extrapolated from two small batches.

    The batches have no data (torch's `meta` device) if the code of the model allows it.
    """
    try:
        few, more = (_saved(module, shape, rows, torch.device("meta")) for rows in PROBED)
    except Exception:  # a model whose code needs numbers
        few, more = (_saved(module, shape, rows, next(module.parameters()).device) for rows in PROBED)
    a_row = (more - few) / (PROBED[1] - PROBED[0])
    return int(few + a_row * (batch_size - PROBED[0]))


def _saved(module: nn.Module, shape: tuple[int, ...], rows: int, device: torch.device) -> int:
    """Return the bytes of the tensors that autograd saves in one forward pass, without the parameters."""
    scratch = copy.deepcopy(module).to(device)  # its running statistics may move
    own = {parameter.untyped_storage()._cdata for parameter in scratch.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    inputs = torch.zeros(rows, *shape, dtype=next(scratch.parameters()).dtype, device=device)
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits: Tensor = scratch(inputs)
    return sum(seen.values()) + logits.numel() * logits.element_size()


def _memory(device: torch.device) -> int:
    """Return the bytes of the GPU, or of the machine within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total: int = int(psutil.virtual_memory().total)
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = file.read_text().strip() if file.exists() else "max"
        total = min(total, int(text)) if text.isdigit() else total
    return total
