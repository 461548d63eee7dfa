"""A loss from its declaration: which callable runs, what it receives, and what it must not do."""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UsageError, first_line
from pipeline.randomness import RandomStream

LossFn = Callable[..., Any]
Given = dict[str, Sequence[Tensor | None]]  # name -> a tensor for each replica; None for a bias that is not there

INPUTS = ("logits", "log_probs", "probs", "hidden", "weight", "bias", "labels", "target_probs")
"""What `args` may name.

logits [B, C]; log_probs and probs, their log_softmax and softmax; hidden [B, D], weight [C, D] and bias [C], the
last linear layer's input and parameters; labels int64 [B]; target_probs [B, C], one-hot where the data are labels.
"""
FUSED_INPUTS = frozenset({"hidden", "weight", "bias"})


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
    def unwritten(self, inputs: Given) -> Iterator[None]:
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


def derive(args: Iterable[str], logits: Tensor) -> dict[str, Tensor]:
    """The logits [..., C] themselves, their log_softmax and softmax, as far as `args` ask for them.

    The last two are in float32 at least, on every device: torch's autocast does it on a GPU and not on a CPU.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    made: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: logits,
        "log_probs": lambda: F.log_softmax(wide, -1),
        "probs": lambda: F.softmax(wide, -1),
    }
    autocast = torch.is_autocast_enabled(logits.device.type)
    with torch.autocast(logits.device.type, enabled=False) if autocast else nullcontext():
        return {arg: made[arg]() for arg in args if arg in made}


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
        with stream.resumed(), formulation.unwritten({arg: [inputs[arg]] for arg in formulation.args}):
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
