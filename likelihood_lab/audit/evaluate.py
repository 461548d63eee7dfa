"""Calling a loss on a batch in some precision, and what comes of it: a value, and a gradient for every input."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.inputs import FUSED_INPUTS, LossFn, derive
from likelihood_lab.errors import first_line

NO_GRADIENT = "passes no gradient"
_FROM_LOGITS = frozenset({"logits", "log_probs", "probs"})
_CLASSES_SECOND = (F.cross_entropy, F.nll_loss)  # torch wants classes in the second dimension
_CLASSES_SECOND_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)


@dataclass(frozen=True)
class Loss:
    """A callable and what it receives, in its own order.

    A module with numbers of its own, class weights say, is copied once for each precision that it is called in.
    """

    fn: LossFn
    args: tuple[str, ...]
    _copies: dict[torch.dtype, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    def prepared(self, dtype: torch.dtype, device: torch.device) -> LossFn:
        """The callable itself, or its copy for this precision and device."""
        if not isinstance(self.fn, nn.Module) or not any(t.is_floating_point() for _, t in numbers(self.fn)):
            return self.fn
        if dtype not in self._copies:
            self._copies[dtype] = copy.deepcopy(self.fn).to(device, dtype)
        return self._copies[dtype]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that are called."""
        return [*self._copies.values()] or ([self.fn] if isinstance(self.fn, nn.Module) else [])

    @property
    def fused(self) -> bool:
        """Whether it takes the last layer's input and weights."""
        return bool(FUSED_INPUTS & set(self.args))

    @property
    def flattens(self) -> bool:
        """Whether [B, T, V] is handed to it as [B * T, V]: to torch's own, which want classes second."""
        target = getattr(self.fn, "func", self.fn)
        return target in _CLASSES_SECOND or isinstance(self.fn, _CLASSES_SECOND_MODULES)

    def __call__(self, given: Mapping[str, Tensor | None], dtype: torch.dtype, device: torch.device) -> Any:
        """The callable's own answer to inputs of this precision."""
        tensors = [given[arg] for arg in self.args]
        if self.flattens and given["labels"] is not None and given["labels"].ndim > 1:
            dims = {"labels": 0}
            tensors = [
                t if t is None else t.flatten(0, dims.get(arg, -2)) if arg != "labels" else t.flatten()
                for arg, t in zip(self.args, tensors, strict=True)
            ]
        return self.prepared(dtype, device)(*tensors)


def numbers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers and parameters by name, those too that a checkpoint leaves out."""
    yield from module.named_buffers()
    yield from module.named_parameters()


@dataclass(frozen=True)
class Evaluation:
    """What one call came to.

    Attributes:
        value: the objective, a scalar; None where there is none.
        gradients: by input, divided by nothing: the upstream gradient is still in them. None where none arrived.
        error: why there is no value or no gradient.
        overwritten: the inputs whose bits were others afterwards.
    """

    value: Tensor | None = None
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    error: str | None = None
    upstream: float = 1.0
    overwritten: tuple[str, ...] = ()

    def exact(self, name: str) -> Tensor:
        """The gradient of the objective itself, in float64."""
        return cast(Tensor, self.gradients[name]).double() / self.upstream


def differentiable(batch: AuditBatch) -> tuple[str, ...]:
    """The inputs whose gradients are judged."""
    if batch.hidden is None:
        return ("logits",)
    return ("hidden", "weight") if batch.bias is None else ("hidden", "weight", "bias")


def inputs(
    batch: AuditBatch, args: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """(leaves, given): tensors to differentiate by, and what the loss is handed: copies, never the leaves themselves.

    A loss that overwrites what it is handed can therefore be told by comparing the two.
    """
    leaves = {
        name: _laid_out(getattr(batch, name), batch.layout).to(device, dtype).requires_grad_()
        for name in differentiable(batch)
    }
    given: dict[str, Tensor | None] = {name: _seen(leaf, batch.layout) for name, leaf in leaves.items()}
    if batch.hidden is not None:
        given.setdefault("bias", None)
        if _FROM_LOGITS & set(args):
            given["logits"] = F.linear(*(given[name] for name in ("hidden", "weight", "bias")))  # type: ignore[arg-type]
    labels = batch.labels.to(device, copy=True)
    if batch.layout == "strided":
        labels = torch.stack([labels, labels], -1)[..., 0]
    given["labels"] = labels
    given["target_probs"] = batch.target_probs.to(device, dtype, copy=True) if "target_probs" in args else None
    if (logits := given.get("logits")) is not None:
        given |= {name: tensor for name, tensor in derive(args, logits).items() if name != "logits"}
    return leaves, given


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A copy that lies in memory as asked; "strided" has a column of zeros behind every one of its own."""
    if layout == "transposed":
        return tensor.detach().mT.contiguous().mT if tensor.ndim > 1 else tensor.detach().clone()
    if layout == "strided" and tensor.ndim > 1:
        return torch.stack([tensor.detach(), torch.zeros_like(tensor)], -1).flatten(-2)
    return tensor.detach().clone()


def _seen(leaf: Tensor, layout: str) -> Tensor:
    return _own_columns(leaf.clone(), layout)


def _own_columns(tensor: Tensor, layout: str) -> Tensor:
    """A view without the columns of zeros of a strided layout."""
    return tensor[..., ::2] if layout == "strided" and tensor.ndim > 1 else tensor


def scalar(answer: Any) -> Tensor:
    """The objective in a loss's answer: the answer itself, or the first of several.

    Raises:
        TypeError: it is no scalar tensor; the message says what it is.
    """
    value = answer[0] if isinstance(answer, tuple | list) and answer else answer
    if not isinstance(value, Tensor):
        raise TypeError(f"returned {type(value).__name__}, not a scalar tensor")
    if value.ndim != 0:
        raise TypeError(f"returned shape {list(value.shape)}; the scalar objective is needed (reduction='mean')")
    return value


def evaluate(loss: Loss, batch: AuditBatch, dtype: torch.dtype, device: torch.device) -> Evaluation:
    """Call a loss on a batch whose inputs are in `dtype`; what it raises is told, not raised."""
    leaves, given = inputs(batch, loss.args, dtype, device)
    handed = {name: given[name] for name in dict.fromkeys(loss.args)}
    before = {name: _original(name, tensor, leaves, batch) for name, tensor in handed.items()}
    try:
        value = scalar(loss(given, dtype, device))
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        outside = torch.full_like(value, batch.upstream)
        if value.requires_grad:
            found = torch.autograd.grad(value, list(leaves.values()), outside, allow_unused=True)
    except (Exception, SystemExit) as raised:  # whatever a user's loss raises is what is told of it
        return Evaluation(error=f"{type(raised).__name__}: {first_line(raised)}")
    step = 2 if batch.layout == "strided" else 1
    gradients = {
        name: None if g is None else g.detach().cpu()[..., :: step if g.ndim > 1 else 1]
        for name, g in zip(leaves, found, strict=True)
    }
    missing = [name for name, g in gradients.items() if g is None]
    return Evaluation(
        value.detach().cpu(),
        gradients,
        f"{NO_GRADIENT} to {', '.join(missing)}" if missing else None,
        outside.item(),  # as the precision rounds it
        tuple(name for name in before if not same_bits(handed[name], before[name])),
    )


def _original(name: str, handed: Tensor | None, leaves: dict[str, Tensor], batch: AuditBatch) -> Tensor | None:
    """What an input was before the call: the leaf that it is a copy of, or else a copy."""
    if handed is None or name not in leaves:
        return None if handed is None else handed.detach().clone()
    return _own_columns(leaves[name].detach(), batch.layout)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers, NaN equal to NaN and the sign of a zero aside."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
