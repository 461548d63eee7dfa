"""A loss from its declaration, and every replica's own loss on its own batch.

The declared callable is what runs, once for each replica.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood_lab.categorical.inputs import FUSED_INPUTS, INPUTS, Given, LossFn, derive
from likelihood_lab.errors import UsageError, first_line, is_out_of_memory
from pipeline.engine.object_state import get_object_state, set_object_state
from pipeline.engine.seeding import EVERYTHING, RandomStream, Variation, derive_seed
from pipeline.engine.stack import Outputs
from pipeline.replica import Replica

_NOTHING = nullcontext()


@dataclass(frozen=True)
class _Arm:
    formulation: Formulation
    fns: list[LossFn]
    streams: list[RandomStream] | None  # only for a loss that draws random numbers


class Objectives:
    """The objectives of a stack whose replicas are sorted by arm.

    Nothing that one arm needs is computed for another: softmax and its logarithm are taken of an arm's own logits,
    so an arm's bits do not depend on who else is in the trial.

    Attributes:
        seeds: the distinct seeds; labels and targets come once for each.
        lr_scales: what each replica's learning rate is multiplied by.
    """

    def __init__(
        self,
        formulations: Sequence[Formulation],
        replicas: Sequence[Replica],
        num_classes: int,
        device: torch.device,
        dtype: torch.dtype,
        variation: Variation = EVERYTHING,
    ) -> None:
        self.seeds = list(dict.fromkeys(replica.seed for replica in replicas))
        self.slots = [self.seeds.index(replica.seed) for replica in replicas]
        self.raised: dict[int, tuple[int, str]] = {}  # replica -> the call at which its loss first raised, and what
        self.calls = 0
        self.device = device
        self.arms: list[_Arm] = []
        for formulation in formulations:
            seeds = [variation.training(replica.seed) for replica in replicas if replica.arm == formulation.name]
            draws = probe(formulation, num_classes, device, dtype).draws_random_numbers
            streams = [RandomStream(derive_seed(seed, "loss"), device) for seed in seeds] if draws else None
            self.arms.append(_Arm(formulation, [formulation.instance(device, dtype) for _ in seeds], streams))
        self.sizes = [len(arm.fns) for arm in self.arms]
        self.fused = any(arm.formulation.fused for arm in self.arms)
        self.lr_scales = [arm.formulation.lr_scale for arm in self.arms for _ in arm.fns]
        self.needs_target_probs = any("target_probs" in arm.formulation.args for arm in self.arms)

    def __call__(self, outputs: Outputs, labels: Tensor, target_probs: Tensor | None) -> list[Tensor]:
        """R scalars in replica order, from logits [R, B, C], labels [S, B] and target_probs [S, B, C] by seed."""
        by_seed = {"labels": labels} if target_probs is None else {"labels": labels, "target_probs": target_probs}
        objectives: list[Tensor] = []
        self.calls += 1
        for arm, logits in zip(self.arms, outputs.logits.split(self.sizes), strict=True):
            mine = slice(len(objectives), len(objectives) + len(arm.fns))
            given: Given = {name: tensor.unbind() for name, tensor in derive(arm.formulation.args, logits).items()}
            for name in arm.formulation.args:
                if name in by_seed:  # the arm's own copy: what writes behind torch's back reaches no other
                    rows = by_seed[name].clone().unbind()
                    given[name] = [rows[slot] for slot in self.slots[mine]]
                elif name in FUSED_INPUTS:
                    given[name] = _of_fused(outputs, name, mine)
            with arm.formulation.forbid_inplace_changes(given):
                objectives += self._of_arm(arm, given, logits, mine.start)
        return objectives

    def progress(self) -> dict[str, Any]:
        """What the losses remember, where their streams stand, and which have raised."""
        return {
            "calls": self.calls,
            "raised": self.raised,
            "memory": [[get_object_state(fn) for fn in arm.fns] for arm in self.arms],
            "streams": [[stream.position for stream in arm.streams or ()] for arm in self.arms],
        }

    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        """Stand where the objectives of the same replicas stood."""
        self.calls, self.raised = progress["calls"], progress["raised"]
        for arm, memories, positions in zip(self.arms, progress["memory"], progress["streams"], strict=True):
            for fn, memory in zip(arm.fns, memories, strict=True):
                set_object_state(fn, memory, self.device)
            for stream, position in zip(arm.streams or (), positions, strict=True):
                stream.position = position

    def _of_arm(self, arm: _Arm, given: Given, logits: Tensor, first: int) -> list[Tensor]:
        batches = zip(*(given[name] for name in arm.formulation.args), strict=True)
        objectives = []
        for i, (fn, batch) in enumerate(zip(arm.fns, batches, strict=True)):
            try:
                with arm.streams[i].resumed() if arm.streams else _NOTHING:
                    objectives.append(arm.formulation.objective(fn, batch))
            except UsageError:
                raise
            except (Exception, SystemExit) as error:  # this replica has failed; its neighbours go on
                if is_out_of_memory(error):
                    raise
                self.raised.setdefault(
                    first + i, (self.calls, f"the loss raised {type(error).__name__}: {first_line(error)}")
                )
                objectives.append(logits[i].sum() * torch.nan)
        return objectives


def _of_fused(outputs: Outputs, name: str, mine: slice) -> Sequence[Tensor | None]:
    """An arm's share of `hidden`, `weight` or `bias`; a head may have no bias."""
    tensors: Sequence[Tensor] | None = getattr(outputs, name)
    return [None] * (mine.stop - mine.start) if tensors is None else tensors[mine]


@dataclass(frozen=True)
class Formulation:
    """One way to write a loss.

    Attributes:
        name: the arm's name.
        args: what the callable receives, in its own order; a subset of `INPUTS`.
        make: returns a fresh instance of the callable; every replica gets its own.
        lr_scale: the arm's learning rate is the trial's times this; what a loss that is k times another needs 1/k of.
    """

    name: str
    args: tuple[str, ...]
    make: Callable[[], LossFn]
    lr_scale: float = 1.0

    def __post_init__(self) -> None:
        unknown = [arg for arg in self.args if arg not in INPUTS]
        if unknown or not self.args:
            problem = f"names unknown inputs {unknown}" if unknown else "is empty"
            raise UsageError(f"loss.{self.name}.args {problem}; choose from {', '.join(INPUTS)}")

    def instance(self, device: torch.device, dtype: torch.dtype) -> LossFn:
        """A callable of its own for one replica, its buffers on the device; trainable ones are refused."""
        fn = self.make()
        if not callable(fn):
            raise UsageError(
                f"loss.{self.name}.fn makes a {type(fn).__name__}, which cannot be called; "
                "for a function add `_partial_: true`"
            )
        if isinstance(fn, nn.Module):
            if any(p.requires_grad for p in fn.parameters()):
                raise UsageError(
                    f"loss.{self.name}.fn has trainable parameters of its own; a formulation is a fixed function: "
                    "freeze them or move them into the model"
                )
            fn = fn.to(device, dtype)
        return fn

    @property
    def fused(self) -> bool:
        """Whether it takes the last layer's input and weights instead of the logits."""
        return bool(FUSED_INPUTS & set(self.args))

    def objective(self, fn: LossFn, batch: Sequence[Tensor | None]) -> Tensor:
        """The declared callable's scalar value on one replica's batch, given in the order of `args`."""
        value = fn(*batch)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(
                f"loss {self.name} returned {got} for a batch; the scalar objective is needed "
                "(most losses take reduction='mean')"
            )
        return value

    @contextmanager
    def forbid_inplace_changes(self, inputs: Given) -> Iterator[None]:
        """Refuse a loss that overwrites an input that others share, or any view of it.

        Raises:
            UsageError: it did.
        """
        before = {name: _changes(tensors) for name, tensors in inputs.items()}
        try:
            yield
        finally:  # also of one that torch itself stopped for it
            for name, tensors in inputs.items():
                if _changes(tensors) != before[name]:
                    raise UsageError(
                        f"loss {self.name} overwrites its input {name}, which other losses share; clone it first"
                    )


def _changes(tensors: Sequence[Tensor | None]) -> int:
    """Torch's count of in-place changes, which a tensor shares with its views."""
    return sum(tensor._version for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class ProbeFinding:
    """What one call of a loss on made-up data showed."""

    draws_random_numbers: bool


def probe(
    formulation: Formulation, num_classes: int, device: torch.device, dtype: torch.dtype, width: int = 8
) -> ProbeFinding:
    """Call a fresh instance once, forward and backward, so that a loss that cannot run fails before training.

    Raises:
        UsageError: it raises, returns no scalar, or passes no gradient to the logits (or to hidden and weight).
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(num_classes, width, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.zeros(num_classes, device=device, dtype=dtype, requires_grad=True)
    labels = torch.arange(4, device=device) % num_classes
    logits = F.linear(hidden, weight, bias)
    in_a_stack = derive(formulation.args, logits.unsqueeze(0))  # in training, too, it gets a slice
    inputs = {name: tensor.unbind()[0] for name, tensor in in_a_stack.items()} | {
        "hidden": hidden, "weight": weight, "bias": bias, "labels": labels,
        "target_probs": F.one_hot(labels, num_classes).to(dtype),
    }  # fmt: skip
    fn = formulation.instance(device, dtype)
    stream = RandomStream(0, device)
    try:
        with stream.resumed(), formulation.forbid_inplace_changes({arg: [inputs[arg]] for arg in formulation.args}):
            value = formulation.objective(fn, [inputs[arg] for arg in formulation.args])
            if value.requires_grad:
                value.backward()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        shapes = ", ".join(f"{arg} {list(inputs[arg].shape)}" for arg in formulation.args)
        raise UsageError(f"loss {formulation.name} failed when called with {shapes}: {first_line(error)}") from error
    if not value.requires_grad:
        raise UsageError(f"loss {formulation.name} passes no gradient to its inputs: it is detached from them")
    return ProbeFinding(draws_random_numbers=stream.moved)


def code_digest(target: Any) -> str:
    """What code stands behind a callable: "package==version" where installed, else a digest of its source file."""
    target = inspect.unwrap(getattr(target, "func", target))
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        target = type(target)
    module = inspect.getmodule(target)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return f"builtin:{getattr(target, '__qualname__', target)}"
    package = module.__name__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    if version and Path(file).is_relative_to(sysconfig.get_paths()["purelib"]):
        return f"{package}=={version}"
    return "sha256:" + hashlib.sha256(Path(file).read_bytes()).hexdigest()
