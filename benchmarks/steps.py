"""The stack's step against a bare loop: one `nn.Module`, tensors in memory, SGD with momentum."""

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
    """Which vmap can batch, as it cannot torch's own."""
    return (labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)).to(logits)


@dataclass(frozen=True)
class Case:
    """A model on data, and which stacks of it are timed: (engine, replicas, with the losses).

    The engine `vmap` is no engine of the product but what it is compared with.
    """

    name: str
    make_model: Callable[..., nn.Module]
    data: Dataset
    stacks: Sequence[tuple[str, int, bool]]
    steps: int


@dataclass(frozen=True)
class Row:
    """One stack against as many bare loops, one after the other."""

    case: str
    engine: str
    replicas: int
    with_losses: bool
    bare: Spread  # seconds a step of one bare loop
    step: Spread  # seconds a step of the whole stack
    gain: Spread


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """What is worth knowing on this kind of device."""
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
    """Every stack of the case and the bare loops, interleaved."""
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
    """What share of this core's sgemm rate the stack's matrix products reach, over the whole step.

    Multiplications and additions of one plain module's forward and backward pass, by torch's own count, for each
    replica, over the step's time and over the rate of a 512 x 512 x 512 product measured now.
    """
    module = case.make_model(input_shape=case.data.input_shape, num_classes=case.data.num_classes).train()
    with FlopCounterMode(display=False) as count:
        module(torch.zeros(BATCH, *case.data.input_shape)).sum().backward()
    return row.replicas * count.get_total_flops() / row.step.median / sgemm_rate()


def sgemm_rate(size: int = 512, repetitions: int = 15) -> float:
    """Floating-point operations a second of one thread in a product of square matrices; the median."""
    square = torch.randn(size, size)
    seconds = interleaved({"sgemm": Contender(lambda: torch.mm(square, square), 1)}, repetitions, time.process_time)
    return 2 * size**3 / statistics.median(seconds["sgemm"])


def of_bandwidth(row: Row, case: Case) -> float:
    """What share of this core's copying rate the stack reaches with what SGD with momentum cannot leave out.

    Seven times each weight: read forward and backward, its gradient written and read, its momentum read and
    written, itself written. Where it all fits into a cache, that is no limit and the share may exceed 1.
    """
    module = case.make_model(input_shape=case.data.input_shape, num_classes=case.data.num_classes)
    weights = sum(4 * parameter.numel() for parameter in module.parameters())
    return row.replicas * 7 * weights / row.step.median / copy_rate()


def copy_rate(size: int = 2**27, repetitions: int = 5) -> float:
    """Bytes a second that one thread reads and writes in a copy far larger than any cache; the median."""
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
    """The product's module, ready to step."""
    replicas = _replicas(count)
    seeds = [replica.seed for replica in replicas]
    stack = build_stack(engine, [builder(seed).to(device) for seed in seeds], seeds, fast=fast).train()
    present = FORMULATIONS[: len({replica.arm for replica in replicas})]
    make_objectives = Objectives if with_losses else _FixedGradient
    objectives = make_objectives(present, replicas, data.num_classes, device, torch.float32)
    module = WithoutTrainer(stack, objectives, replicas, data, builder.input_shape, recipe())
    module.snapshots = []  # a few in a whole training, too many in a short measurement
    module.on_fit_start()
    module.on_train_epoch_start()
    return module


def recipe() -> Recipe:
    """As `optimizer=sgd` declares it."""
    make = partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9)
    return Recipe(epochs=30, batch_size=BATCH, make_optimizer=make)


class WithoutTrainer(StackTrainingModule):
    """The module as Lightning leaves it when training starts."""

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self.configure_optimizers()


class _FixedGradient(Objectives):
    """In place of the losses: the same dL/dlogits whatever the logits are."""

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
    """So many replicas, shared out over the arms; an arm's seeds are 0, 1, ..."""
    arms = len(FORMULATIONS)
    places = sorted((i % arms, i // arms) for i in range(count))
    return [Replica(FORMULATIONS[arm].name, seed) for arm, seed in places]


def _stepping(module: StackTrainingModule, steps: int) -> Callable[[], None]:
    """So many steps through `training_step`, over whole batches of the epoch's order."""
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
