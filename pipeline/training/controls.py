"""Controls: runs that a trial adds in order to check its own answers.

replay   negative control: the reference again in another slot. If its bits differ, the platform is not deterministic.
placebo  negative control: the reference with different rounding, in two variants. In float32: computed in float64 and
         cast back, and with permuted classes. In bfloat16: gradients from float64, rounded up or down at random, with
         two draws. It measures how far rounding alone moves the weights, and is equivalent by construction.
dose     positive control: the reference with its logits times 1 + d. The trial must detect this known difference.
rank     runs of the rank test, if requested: copies of the reference, and the candidates, with gradients rounded at
         random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from likelihood_lab.categorical.inputs import LossFn, derive
from pipeline.replica import DITHERED, DITHERED_AGAIN, DOSE, IN_FLOAT64, REORDERED, REPLAY
from pipeline.training.objectives import Formulation

Given = dict[str, Tensor | None]
Change = Callable[[Given], Given]

_MADE_OF_LOGITS = ("logits", "log_probs", "probs")


def control(name: str, reference: Formulation, dose: float | None = None) -> Formulation:
    """Return the loss of a control.

    Args:
        dose: d of the positive control.
    """
    if name == REPLAY:
        return replace(reference, name=name)
    changes: Mapping[str, Change] = {
        IN_FLOAT64: _in_float64,
        DITHERED: partial(_dithered, number=1),
        DITHERED_AGAIN: partial(_dithered, number=2),
        REORDERED: _reordered,
        DOSE: partial(_dosed, dose=dose or 0.0),
    }
    return _rewritten(name, reference, changes[name])


def dithered(name: str, formulation: Formulation, bits: int, number: int) -> Formulation:
    """Return the loss with gradients rounded at random to `bits` significant bits.

    The loss is computed in its own precision, not in float64.
    """
    return _rewritten(name, formulation, partial(_dithered, number=number, bits=bits, double=False))


def _rewritten(name: str, loss: Formulation, change: Change) -> Formulation:
    make = partial(_Rewritten, args=loss.args, change=change)
    return replace(loss, name=name, args=base_args(loss.args), make=lambda: make(loss.make()))


def base_args(args: tuple[str, ...]) -> tuple[str, ...]:
    """Replace log_probs and probs by logits. A control derives them from the logits itself."""
    return tuple(dict.fromkeys("logits" if arg in _MADE_OF_LOGITS else arg for arg in args))


class _Rewritten(nn.Module):
    """Loss on changed inputs. Its value has the dtype of the unchanged inputs."""

    def __init__(self, fn: LossFn, args: tuple[str, ...], change: Change) -> None:
        super().__init__()
        self.fn, self.args, self.change = fn, args, change
        self._double: LossFn | None = None

    def forward(self, *tensors: Tensor | None) -> Tensor:
        given: Given = dict(zip(base_args(self.args), tensors, strict=True))
        first = next(t for name, t in given.items() if t is not None and t.is_floating_point() and name != "labels")
        changed = self.change(given)
        logits = changed.get("logits")
        if logits is not None:
            changed |= derive(self.args, logits)
        answer = self._fn(changed)(*(changed[arg] for arg in self.args))
        value: Tensor = answer[0] if isinstance(answer, tuple | list) else answer
        return value.to(first.dtype)

    def _fn(self, changed: Given) -> LossFn:
        """Return the loss, or its float64 copy if an input is float64."""
        doubles = any(t is not None and t.dtype == torch.float64 for t in changed.values())
        if not (doubles and isinstance(self.fn, nn.Module)):
            return self.fn
        if self._double is None:
            object.__setattr__(self, "_double", copy.deepcopy(self.fn).double())
        assert self._double is not None  # noqa: S101 - just made
        return self._double


def _in_float64(given: Given) -> Given:
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in given.items()}


class _Dither(torch.autograd.Function):
    """Identity whose gradient is rounded at random, without bias, to `bits` significant bits.

    The random numbers are drawn in the forward pass, inside the random stream of the replica. Arms of one seed have
    equal streams; `number` makes their draws different.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, bits: int, number: int) -> Tensor:
        base = int(torch.randint(2**62, ()))
        generator = torch.Generator().manual_seed(base ^ (number * 0x9E3779B97F4A7C15 % 2**62))
        ctx.bits, ctx.dtype = bits, tensor.dtype
        ctx.save_for_backward(torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device))
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (drawn,) = ctx.saved_tensors
        mantissa, exponent = torch.frexp(upstream[0].double())
        whole = torch.ldexp(mantissa, torch.tensor(ctx.bits))
        rounded = (whole + drawn).floor()  # rounds up with the probability of the part that is cut off
        return torch.ldexp(rounded, exponent - ctx.bits).to(ctx.dtype), None, None


SIGNIFICANT = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def _dithered(given: Given, number: int, bits: int | None = None, double: bool = True) -> Given:
    """Round the gradients at random, to `bits` or the bits of the dtype. With `double` the loss is in float64."""

    def changed(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        wide = tensor.double() if double else tensor
        dithered: Tensor = _Dither.apply(wide, bits or SIGNIFICANT[tensor.dtype], number)
        return dithered

    return {name: changed(tensor) for name, tensor in given.items()}


def _reordered(given: Given) -> Given:
    """Permute the classes of inputs and labels, so that sums over classes round differently."""
    wide = next(t for name, t in given.items() if t is not None and name in ("logits", "target_probs", "weight"))
    classes = wide.shape[0] if "weight" in given and wide is given["weight"] else wide.shape[-1]
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(classes)).to(wide.device)
    return {name: _in_order(name, tensor, order) for name, tensor in given.items()}


def _in_order(name: str, tensor: Tensor | None, order: Tensor) -> Tensor | None:
    if tensor is None or name == "hidden":
        return tensor
    if name == "labels":
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        inside = (tensor >= 0) & (tensor < len(order))
        return torch.where(inside, inverse[tensor.clamp(0, len(order) - 1)], tensor)
    return tensor[order] if name in ("weight", "bias") else tensor[..., order]


def _dosed(given: Given, dose: float) -> Given:
    """Multiply the logits by 1 + dose. For a fused loss, multiply hidden and bias, which scales the logits equally."""
    scaled = ("logits", "hidden", "bias")
    return {name: t * (1 + dose) if t is not None and name in scaled else t for name, t in given.items()}


def declared(name: str, reference: Mapping[str, Any], dose: float | None) -> dict[str, Any]:
    """Return the declaration of a control for its cells: that of the reference, with the name and dose added."""
    return {**reference, "control": name} | ({"dose": dose} if name == DOSE else {})
