"""Compare the step of a stack with a bare loop: one `nn.Module`, tensors in memory, SGD with momentum."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Contender, Spread, clock, gain, interleaved
from benchmarks.vmapped import Vmapped
from pipeline.data.dataset import Dataset, make_dataset
from pipeline.data.loaders import digits
from pipeline.engine.choose import build_stack
from pipeline.engine.stack import Outputs
from pipeline.models import ModelBuilder, cnn, mlp
from pipeline.replica import Replica
from pipeline.training.module import Recipe, StackTrainingModule
from pipeline.training.objectives import Formulation, Objectives

BATCH = 64
LEARNING_RATE = 0.1
RIVAL = "vmap"
FORMULATIONS = (
    Formulation("nll", ("log_probs", "labels"), nn.NLLLoss),
    Formulation("ce", ("logits", "labels"), nn.CrossEntropyLoss),
    Formulation("kl", ("log_probs", "target_probs"), partial(nn.KLDivLoss, reduction="batchmean")),
)
BARE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll": lambda logits, labels: F.nll_loss(F.log_softmax(logits, -1), labels),
    "ce": F.cross_entropy,
    "kl": lambda logits, labels: F.kl_div(F.log_softmax(logits, -1), _one_hot(logits, labels), reduction="batchmean"),
}


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """Return one-hot labels. vmap cannot batch `F.one_hot`."""
    return (labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)).to(logits)


@dataclass(frozen=True)
class Case:
    """Model, data, and the stacks to time: (engine, replicas, with the losses).

    The engine `vmap` is not an engine of the pipeline but the alternative.
    """

    name: str
    make_model: Callable[..., nn.Module]
    data: Dataset
    stacks: Sequence[tuple[str, int, bool]]
    steps: int


@dataclass(frozen=True)
class Row:
    """Times of one stack and of as many bare loops, one after the other."""

    case: str
    engine: str
    replicas: int
    with_losses: bool
    bare: Spread  # seconds a step of one bare loop
    step: Spread  # seconds a step of the whole stack
    gain: Spread


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yield the cases for this kind of device."""
    fashion_like, small = partial(_random_data, 2048), partial(_random_data, 256)
    if device.type == "cuda":
        many = [("fold", r, True) for r in (1, 30, 90, 300)] + [("fold", 30, False)]
        yield Case("digits, MLP 64-128-10", mlp, digits(), many, 64)
        yield Case("random 28x28, MLP 784-128-10", mlp, fashion_like(), many, 64)
        yield Case("random 28x28, CNN", cnn, small(), [("fold", r, True) for r in (1, 16, 90)], 16)
    elif quick:
        yield Case("digits, MLP 64-128-10", mlp, digits(), [("fold", 30, True), ("fold", 30, False)], 8)
    else:
        from torchvision.models import resnet18

        many = [("fold", r, True) for r in (1, 3, 9, 30, 90, 300)] + [("fold", 30, False), ("loop", 9, True)]
        yield Case("digits, MLP 64-128-10", mlp, digits(), [*many, *(("vmap", r, True) for r in (30, 300))], 32)
        both, rival = [("fold", 30, True), ("fold", 30, False)], ("vmap", 30, True)
        for width in (32, 512):
            yield Case(f"digits, MLP 64-{width}-10", partial(mlp, hidden=(width,)), digits(), [*both, rival], 16)
        few = [("fold", r, True) for r in (3, 9, 30)]
        yield Case("random 28x28, MLP 784-128-10", mlp, fashion_like(), [*few, rival], 16)
        yield Case("random 28x28, CNN", cnn, small(), [("loop", r, True) for r in (1, 3)], 3)
        yield Case("random 28x28, ResNet-18", resnet18, small(), [("loop", 1, True)], 1)


def measure(case: Case, device: torch.device, repetitions: int) -> list[Row]:
    """Measure every stack of the case and the bare loops, interleaved."""
    steps = case.steps
    data = case.data.to(device, torch.float32)
    builder = ModelBuilder(case.make_model, "model", data.input_shape, data.num_classes)
    contenders = {arm: Contender(_bare(builder, data, device, arm, steps), steps) for arm in BARE_LOSSES}
    for stack in case.stacks:
        contenders[str(stack)] = Contender(_run_of(stack, builder, data, device, steps), steps)
    seconds = interleaved(contenders, repetitions, clock(device))
    bare = [statistics.fmean(each) for each in zip(*(seconds[arm] for arm in BARE_LOSSES), strict=True)]
    rows = []
    for stack in case.stacks:
        ours, replicas = seconds[str(stack)], stack[1]
        rows.append(Row(case.name, *stack, Spread.of(bare), Spread.of(ours), gain(bare, ours, replicas)))
    return rows


def of_ceiling(row: Row, case: Case) -> float:
    """Return the share of the core's sgemm rate that the matrix products of a whole step reach.

    Torch counts the multiplications and additions of one plain module's forward and backward pass. The share is this
    count times R, over the step's time and over the rate of a 512 x 512 x 512 product measured now.
    """
    module = case.make_model(input_shape=case.data.input_shape, num_classes=case.data.num_classes).train()
    with FlopCounterMode(display=False) as count:
        module(torch.zeros(BATCH, *case.data.input_shape)).sum().backward()
    return row.replicas * count.get_total_flops() / row.step.median / sgemm_rate()


def sgemm_rate(size: int = 512, repetitions: int = 15) -> float:
    """Return the median floating-point operations per second of one thread in a product of square matrices."""
    square = torch.randn(size, size)
    seconds = interleaved({"sgemm": Contender(lambda: torch.mm(square, square), 1)}, repetitions, time.process_time)
    return 2 * size**3 / statistics.median(seconds["sgemm"])


def of_bandwidth(row: Row, case: Case) -> float:
    """Return the share of the core's copying rate that the necessary memory traffic of SGD with momentum reaches.

    It is seven times each weight: read forward and backward, gradient written and read, momentum read and written,
    weight written. If all of it fits into a cache, the share may exceed 1.
    """
    module = case.make_model(input_shape=case.data.input_shape, num_classes=case.data.num_classes)
    weights = sum(4 * parameter.numel() for parameter in module.parameters())
    return row.replicas * 7 * weights / row.step.median / copy_rate()


def copy_rate(size: int = 2**27, repetitions: int = 5) -> float:
    """Return the median bytes per second that one thread reads and writes in a copy far larger than any cache."""
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    seconds = interleaved({"copy": Contender(lambda: target.copy_(source), 1)}, repetitions, time.process_time)
    return 2 * size / statistics.median(seconds["copy"])


def stacked(
    builder: ModelBuilder,
    data: Dataset,
    device: torch.device,
    engine: str,
    count: int,
    with_losses: bool,
    fast: bool = True,
) -> StackTrainingModule:
    """Return the pipeline's module, ready to step."""
    replicas = _replicas(count)
    seeds = [replica.seed for replica in replicas]
    stack = build_stack(engine, [builder(seed).to(device) for seed in seeds], seeds, fast=fast).train()
    present = FORMULATIONS[: len({replica.arm for replica in replicas})]
    make_objectives = Objectives if with_losses else _FixedGradient
    objectives = make_objectives(present, replicas, data.num_classes, device, torch.float32)
    module = WithoutTrainer(stack, objectives, replicas, data, builder.input_shape, recipe())
    module.sketch_steps = []  # a few in a whole training, too many in a short measurement
    module.on_fit_start()
    module.on_train_epoch_start()
    return module


def recipe() -> Recipe:
    """Return the recipe with the optimizer that `optimizer=sgd` declares."""
    make = partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9)
    return Recipe(epochs=30, batch_size=BATCH, make_optimizer=make)


class WithoutTrainer(StackTrainingModule):
    """Module that steps without a Lightning trainer."""

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self.configure_optimizers()


class _FixedGradient(Objectives):
    """Replacement of the losses with a constant dL/dlogits."""

    def __call__(self, outputs: Outputs, labels: Tensor, target_probs: Tensor | None) -> list[Tensor]:
        return list(_Fixed.apply(outputs.logits).unbind())


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.shape = logits.shape
        return logits.new_zeros(logits.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.new_full(ctx.shape, 1e-5)


def _replicas(count: int) -> list[Replica]:
    """Return `count` replicas, spread over the arms; the seeds of an arm are 0, 1, ..."""
    arms = len(FORMULATIONS)
    places = sorted((i % arms, i // arms) for i in range(count))
    return [Replica(FORMULATIONS[arm].name, seed) for arm, seed in places]


def _stepping(module: StackTrainingModule, steps: int) -> Callable[[], None]:
    """Return a function that does `steps` steps by `training_step`, over whole batches of the epoch's order."""
    whole = module.num_examples // BATCH

    def run() -> None:
        for done in range(0, steps, whole):
            module.training_step(slice(0, min(whole, steps - done)), 0)

    return run


def _run_of(
    stack: tuple[str, int, bool], builder: ModelBuilder, data: Dataset, device: torch.device, steps: int
) -> Callable[[], None]:
    if stack[0] == RIVAL:
        return _vmapped(builder, data, stack[1], steps)
    return _stepping(stacked(builder, data, device, *stack), steps)


def _vmapped(builder: ModelBuilder, data: Dataset, count: int, steps: int) -> Callable[[], None]:
    counts = Counter(replica.arm for replica in _replicas(count))
    model, order = Vmapped(builder, BARE_LOSSES, counts, LEARNING_RATE), data.splits["train"]
    batches = order[: len(order) // BATCH * BATCH].split(BATCH)

    def run() -> None:
        for batch in itertools.islice(itertools.cycle(batches), steps):
            model.step(*data.take(batch.expand(count, BATCH)))

    return run


def _bare(builder: ModelBuilder, data: Dataset, device: torch.device, arm: str, steps: int) -> Callable[[], None]:
    model, loss = builder(0).to(device).train(), BARE_LOSSES[arm]
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    inputs, labels = data.take(data.splits["train"])
    inputs = inputs.expand(len(inputs), *builder.input_shape)  # grey pictures where the model takes colour
    order = torch.randperm(len(labels), device=device)
    batches = order[: len(order) // BATCH * BATCH].split(BATCH)

    def run() -> None:
        for batch in itertools.islice(itertools.cycle(batches), steps):
            optimizer.zero_grad()
            loss(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()

    return run


def _random_data(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count + 20, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count + 20) % 10
    parts = {"train": range(count), "val": range(count, count + 10), "test": range(count + 10, count + 20)}
    splits = {name: list(indices) for name, indices in parts.items()}
    return make_dataset("random", images, labels, splits, [str(i) for i in range(10)])
