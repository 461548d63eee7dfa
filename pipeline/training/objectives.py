"""Losses built from their declarations, and the objectives of all replicas of a stack.

The declared callable itself runs, once for each replica on its own batch.
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
    """Objectives of a stack whose replicas are sorted by arm.

    Softmax and its logarithm are computed separately for each arm. Therefore the bits of an arm do not depend on the
    other arms of the trial.

    Attributes:
        seeds: the distinct seeds; labels and targets have one row for each.
        lr_scales: factor of each replica's learning rate.
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
        self.raised: dict[int, tuple[int, str]] = {}  # replica -> call at which its loss first raised, and the cause
        self.calls = 0
        self.device = device
        self.arms: list[_Arm] = []
        for formulation in formulations:
            seeds = [variation.training(replica.seed) for replica in replicas if replica.arm == formulation.name]
            draws = probe(formulation, num_classes, device, dtype)
            streams = [RandomStream(derive_seed(seed, "loss"), device) for seed in seeds] if draws else None
            self.arms.append(_Arm(formulation, [formulation.instance(device, dtype) for _ in seeds], streams))
        self.sizes = [len(arm.fns) for arm in self.arms]
        self.fused = any(arm.formulation.fused for arm in self.arms)
        self.lr_scales = [arm.formulation.lr_scale for arm in self.arms for _ in arm.fns]
        self.needs_target_probs = any("target_probs" in arm.formulation.args for arm in self.arms)

    def __call__(self, outputs: Outputs, labels: Tensor, target_probs: Tensor | None) -> list[Tensor]:
        """Return R scalars in replica order, from logits [R, B, C], labels [S, B] and target_probs [S, B, C]."""
        by_seed = {"labels": labels} if target_probs is None else {"labels": labels, "target_probs": target_probs}
        objectives: list[Tensor] = []
        self.calls += 1
        for arm, logits in zip(self.arms, outputs.logits.split(self.sizes), strict=True):
            mine = slice(len(objectives), len(objectives) + len(arm.fns))
            given: Given = {name: tensor.unbind() for name, tensor in derive(arm.formulation.args, logits).items()}
            for name in arm.formulation.args:
                if name in by_seed:  # a copy for each arm: a loss that changes `.data` in place changes no other arm
                    rows = by_seed[name].clone().unbind()
                    given[name] = [rows[slot] for slot in self.slots[mine]]
                elif name in FUSED_INPUTS:
                    given[name] = _of_fused(outputs, name, mine)
            with arm.formulation.forbid_inplace_changes(given):
                objectives += self._of_arm(arm, given, logits, mine.start)
        return objectives

    def training_state(self) -> dict[str, Any]:
        """Return the state of the losses, the positions of their streams, and the errors that they raised."""
        return {
            "calls": self.calls,
            "raised": self.raised,
            "object_state": [[get_object_state(fn) for fn in arm.fns] for arm in self.arms],
            "streams": [[stream.position for stream in arm.streams or ()] for arm in self.arms],
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the objectives of the same replicas."""
        self.calls, self.raised = state["calls"], state["raised"]
        for arm, object_states, positions in zip(self.arms, state["object_state"], state["streams"], strict=True):
            for fn, object_state in zip(arm.fns, object_states, strict=True):
                set_object_state(fn, object_state, self.device)
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
            except (Exception, SystemExit) as error:  # only this replica fails; the others continue
                if is_out_of_memory(error):
                    raise
                self.raised.setdefault(
                    first + i, (self.calls, f"the loss raised {type(error).__name__}: {first_line(error)}")
                )
                objectives.append(logits[i].sum() * torch.nan)
        return objectives


def _of_fused(outputs: Outputs, name: str, mine: slice) -> Sequence[Tensor | None]:
    """Return an arm's part of `hidden`, `weight` or `bias`. A head may have no bias."""
    tensors: Sequence[Tensor] | None = getattr(outputs, name)
    return [None] * (mine.stop - mine.start) if tensors is None else tensors[mine]


@dataclass(frozen=True)
class Formulation:
    """Declaration of a loss.

    Attributes:
        name: the name of the loss.
        args: inputs of the callable, in its own order; a subset of `INPUTS`.
        make: returns a new instance of the callable; every replica gets its own.
        lr_scale: factor of the trial's learning rate. A loss that is k times another needs 1/k.
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
        """Make the callable of one replica, with its buffers on the device.

        Raises:
            UsageError: it cannot be called, or has trainable parameters.
        """
        fn = self.make()
        if not callable(fn):
            raise UsageError(
                f"loss.{self.name}.fn makes a {type(fn).__name__}, which cannot be called; "
                "for a function add `_partial_: true`"
            )
        if isinstance(fn, nn.Module):
            if any(p.requires_grad for p in fn.parameters()):
                raise UsageError(
                    f"loss.{self.name}.fn has trainable parameters of its own; a loss is a fixed function: "
                    "freeze them or move them into the model"
                )
            fn = fn.to(device, dtype)
        return fn

    @property
    def fused(self) -> bool:
        """True if the loss takes the input and weights of the last layer instead of the logits."""
        return bool(FUSED_INPUTS & set(self.args))

    def objective(self, fn: LossFn, batch: Sequence[Tensor | None]) -> Tensor:
        """Return the scalar value of the callable on one replica's batch, given in the order of `args`."""
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
        """Raise a UsageError if the loss overwrites an input that other losses share, or a view of it."""
        before = {name: _changes(tensors) for name, tensors in inputs.items()}
        try:
            yield
        finally:  # also if torch raised an error because of the overwriting
            for name, tensors in inputs.items():
                if _changes(tensors) != before[name]:
                    raise UsageError(
                        f"loss {self.name} overwrites its input {name}, which other losses share; clone it first"
                    )


def _changes(tensors: Sequence[Tensor | None]) -> int:
    """Return torch's count of in-place changes, which a tensor shares with its views."""
    return sum(tensor._version for tensor in tensors if tensor is not None)


def probe(formulation: Formulation, num_classes: int, device: torch.device, dtype: torch.dtype, width: int = 8) -> bool:
    """Call a new instance once, forward and backward, so that a loss that cannot run fails before training.

    Returns:
        True if the loss draws random numbers.

    Raises:
        UsageError: it raises, returns no scalar, or passes no gradient to the logits (or to hidden and weight).
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(num_classes, width, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.zeros(num_classes, device=device, dtype=dtype, requires_grad=True)
    labels = torch.arange(4, device=device) % num_classes
    logits = F.linear(hidden, weight, bias)
    in_a_stack = derive(formulation.args, logits.unsqueeze(0))  # a slice of a stack, as in training
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
    return stream.moved


def code_digest(target: Any) -> str:
    """Identify the code of a callable: "package==version" if installed, else the digest of its source file."""
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
