"""Call a loss on a batch in a dtype; return its value and a gradient for each input."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.inputs import LossFn, derive
from likelihood_lab.errors import first_line

NO_GRADIENT = "passes no gradient"
_FROM_LOGITS = frozenset({"logits", "log_probs", "probs"})
_CLASSES_SECOND = (F.cross_entropy, F.nll_loss)  # torch wants classes in the second dimension
_CLASSES_SECOND_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)


@dataclass(frozen=True)
class Loss:
    """A callable and the names of its inputs, in its own order.

    A module with tensors, such as class weights, is copied once for each dtype in which it is called.
    """

    fn: LossFn
    args: tuple[str, ...]
    _copies: dict[torch.dtype, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    def prepared(self, dtype: torch.dtype, device: torch.device) -> LossFn:
        """Return the callable itself, or its copy for this dtype and device."""
        if not isinstance(self.fn, nn.Module) or not any(t.is_floating_point() for _, t in named_tensors(self.fn)):
            return self.fn
        if dtype not in self._copies:
            self._copies[dtype] = copy.deepcopy(self.fn).to(device, dtype)
        return self._copies[dtype]

    @property
    def modules(self) -> list[nn.Module]:
        """The modules behind this loss: its copies, or the module itself."""
        return [*self._copies.values()] or ([self.fn] if isinstance(self.fn, nn.Module) else [])

    @property
    def flattens(self) -> bool:
        """True for torch's own losses: they get [B, T, V] as [B * T, V], because they expect classes second."""
        target = getattr(self.fn, "func", self.fn)
        return target in _CLASSES_SECOND or isinstance(self.fn, _CLASSES_SECOND_MODULES)

    def __call__(self, loss_inputs: Mapping[str, Tensor | None], dtype: torch.dtype, device: torch.device) -> Any:
        """Call the loss with its inputs from `loss_inputs`, in its own order."""
        tensors = [loss_inputs[arg] for arg in self.args]
        if self.flattens and loss_inputs["labels"] is not None and loss_inputs["labels"].ndim > 1:
            tensors = [
                t if t is None else t.flatten() if arg == "labels" else t.flatten(0, -2)
                for arg, t in zip(self.args, tensors, strict=True)
            ]
        return self.prepared(dtype, device)(*tensors)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers and parameters by name, including buffers that a checkpoint omits."""
    yield from module.named_buffers()
    yield from module.named_parameters()


@dataclass(frozen=True)
class Evaluation:
    """Result of one call of a loss.

    Attributes
    ----------
    value: the scalar objective, or None.
    gradients: one for each input, still multiplied by the upstream gradient; None if no gradient arrived.
    error: the reason if there is no value or no gradient.
    upstream: the gradient that the loss received from outside.
    overwritten: the inputs that the call changed.
    """

    value: Tensor | None = None
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    error: str | None = None
    upstream: float = 1.0
    overwritten: tuple[str, ...] = ()

    def exact(self, name: str) -> Tensor:
        """Return the gradient of the objective in float64, without the upstream factor."""
        return cast(Tensor, self.gradients[name]).double() / self.upstream


def differentiable(batch: AuditBatch) -> tuple[str, ...]:
    """Return the names of the inputs whose gradients are compared."""
    if batch.hidden is None:
        return ("logits",)
    return ("hidden", "weight") if batch.bias is None else ("hidden", "weight", "bias")


def inputs(
    batch: AuditBatch, args: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return (leaves, loss_inputs): the tensors to differentiate by, and the copies of them that the loss receives.

    Comparing the two afterwards shows whether the loss has overwritten an input.
    """
    leaves = {
        name: _with_layout(getattr(batch, name), batch.layout).to(device, dtype).requires_grad_()
        for name in differentiable(batch)
    }
    loss_inputs: dict[str, Tensor | None] = {name: _copy_for_loss(leaf, batch.layout) for name, leaf in leaves.items()}
    if batch.hidden is not None:
        loss_inputs.setdefault("bias", None)
        if _FROM_LOGITS & set(args):
            loss_inputs["logits"] = F.linear(*(loss_inputs[name] for name in ("hidden", "weight", "bias")))  # type: ignore[arg-type]
    labels = batch.labels.to(device, copy=True)
    if batch.layout == "strided":
        labels = torch.stack([labels, labels], -1)[..., 0]
    loss_inputs["labels"] = labels
    loss_inputs["target_probs"] = batch.target_probs.to(device, dtype, copy=True) if "target_probs" in args else None
    if (logits := loss_inputs.get("logits")) is not None:
        loss_inputs |= {name: tensor for name, tensor in derive(args, logits).items() if name != "logits"}
    return leaves, loss_inputs


def _with_layout(tensor: Tensor, layout: str) -> Tensor:
    """Return a copy with this memory layout. The layout "strided" inserts a column of zeros after each column."""
    if layout == "transposed":
        return tensor.detach().mT.contiguous().mT if tensor.ndim > 1 else tensor.detach().clone()
    if layout == "strided" and tensor.ndim > 1:
        return torch.stack([tensor.detach(), torch.zeros_like(tensor)], -1).flatten(-2)
    return tensor.detach().clone()


def _copy_for_loss(leaf: Tensor, layout: str) -> Tensor:
    return _without_padding(leaf.clone(), layout)


def _without_padding(tensor: Tensor, layout: str) -> Tensor:
    """Return a view without the zero columns of a strided layout."""
    return tensor[..., ::2] if layout == "strided" and tensor.ndim > 1 else tensor


def scalar(output: Any) -> Tensor:
    """Return the objective in a loss's output: the output itself, or the first item of a tuple or list.

    Raises
    ------
    TypeError: it is not a scalar tensor.
    """
    value = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(value, Tensor):
        raise TypeError(f"returned {type(value).__name__}, not a scalar tensor")
    if value.ndim != 0:
        raise TypeError(f"returned shape {list(value.shape)}; the scalar objective is needed (reduction='mean')")
    return value


def evaluate(loss: Loss, batch: AuditBatch, dtype: torch.dtype, device: torch.device) -> Evaluation:
    """Call a loss on a batch with inputs in `dtype`. Its exceptions become `Evaluation.error`."""
    leaves, loss_inputs = inputs(batch, loss.args, dtype, device)
    passed = {name: loss_inputs[name] for name in dict.fromkeys(loss.args)}
    before = {name: _original(name, tensor, leaves, batch) for name, tensor in passed.items()}
    try:
        value = scalar(loss(loss_inputs, dtype, device))
        derivatives: tuple[Tensor | None, ...] = (None,) * len(leaves)
        outside = torch.full_like(value, batch.upstream)
        if value.requires_grad:
            derivatives = torch.autograd.grad(value, list(leaves.values()), outside, allow_unused=True)
    except (Exception, SystemExit) as raised:  # a user's loss may raise anything
        return Evaluation(error=f"{type(raised).__name__}: {first_line(raised)}")
    step = 2 if batch.layout == "strided" else 1
    gradients = {
        name: None if g is None else g.detach().cpu()[..., :: step if g.ndim > 1 else 1]
        for name, g in zip(leaves, derivatives, strict=True)
    }
    missing = [name for name, g in gradients.items() if g is None]
    return Evaluation(
        value.detach().cpu(),
        gradients,
        f"{NO_GRADIENT} to {', '.join(missing)}" if missing else None,
        outside.item(),  # rounded to the dtype
        tuple(name for name in before if not same_bits(passed[name], before[name])),
    )


def _original(name: str, passed: Tensor | None, leaves: dict[str, Tensor], batch: AuditBatch) -> Tensor | None:
    """Return an input's value before the call: the leaf of which it is a copy, or else a new copy."""
    if passed is None or name not in leaves:
        return None if passed is None else passed.detach().clone()
    return _without_padding(leaves[name].detach(), batch.layout)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors are bitwise equal, except that NaN equals NaN and +0 equals -0."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def equal_evaluations(a: Evaluation, b: Evaluation) -> bool:
    """Return whether value and gradients of two evaluations have the same bits."""
    pairs = [(a.value, b.value), *((a.gradients[name], b.gradients.get(name)) for name in a.gradients)]
    return all(same_bits(x, y) for x, y in pairs)
