"""What a trial trains beside its candidates to know what its own answers are worth.

replay   the reference again, in another slot: anything but the same bits means that this platform is not deterministic
placebo  the reference with other roundings, twice: in float32 once in float64 and cast back, once with its classes in
         another order; in bfloat16 with gradients from float64, rounded up or down at random, by two draws.
         What they do is what rounding does: the measure for the candidates' early steps, and equivalent by construction
dose     the reference with its logits times 1 + d: a difference of a known size, which the study has to notice
rank     where asked for: copies of the reference, and the candidates, with gradients rounded at random
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
from likelihood_lab.stats.trajectory import BITS
from pipeline.replica import CANDIDATE, COPY, DITHERED, DITHERED_AGAIN, DOSE, IN_FLOAT64, REORDERED, REPLAY
from pipeline.training.objectives import Formulation

_MADE_OF_LOGITS = ("logits", "log_probs", "probs")


def ranked(arm: str, formulations: Mapping[str, Formulation], reference: str) -> Formulation:
    """An arm of the rank test; the draws of every copy, and of a candidate, are others."""
    if arm.startswith(COPY):
        return dithered(arm, formulations[reference], BITS, int(arm.removeprefix(COPY)))
    return dithered(arm, formulations[arm.removeprefix(CANDIDATE)], BITS, 0)


def control(name: str, reference: Formulation, dose: float | None = None) -> Formulation:
    """The control of that name as a formulation of its own.

    Args:
        dose: d of the negative control.
    """
    if name == REPLAY:
        return replace(reference, name=name)
    wrap: Mapping[str, Callable[[LossFn], LossFn]] = {
        IN_FLOAT64: lambda fn: _Rewritten(fn, reference.args, _in_float64),
        DITHERED: lambda fn: _Rewritten(fn, reference.args, partial(_dithered, number=1)),
        DITHERED_AGAIN: lambda fn: _Rewritten(fn, reference.args, partial(_dithered, number=2)),
        REORDERED: lambda fn: _Rewritten(fn, reference.args, _reordered),
        DOSE: lambda fn: _Rewritten(fn, reference.args, lambda given: _dosed(given, dose or 0.0)),
    }
    return replace(reference, name=name, args=base_args(reference.args), make=lambda: wrap[name](reference.make()))


def dithered(name: str, formulation: Formulation, bits: int, number: int) -> Formulation:
    """A formulation whose gradients are rounded at random to so many significant bits; its own precision is kept."""
    change = partial(_dithered, number=number, bits=bits, double=False)
    args = formulation.args
    return replace(
        formulation, name=name, args=base_args(args), make=lambda: _Rewritten(formulation.make(), args, change)
    )


def base_args(args: tuple[str, ...]) -> tuple[str, ...]:
    """What `args` are made of: log_probs and probs become logits, from which a control takes them itself."""
    return tuple(dict.fromkeys("logits" if arg in _MADE_OF_LOGITS else arg for arg in args))


Given = dict[str, Tensor | None]


class _Rewritten(nn.Module):
    """A loss called with inputs that are changed first; its value comes back in the precision that came in."""

    def __init__(self, fn: LossFn, args: tuple[str, ...], change: Callable[[Given], Given]) -> None:
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
        """The loss itself, or its copy in float64 where its inputs are."""
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
    """The identity; its gradient comes back with so many significant bits, rounded up or down at random without bias.

    What decides is drawn on the way forward, where the replica's own stream of random numbers is open. `number` tells
    the arms of one seed apart, whose streams are alike.
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
        rounded = (whole + drawn).floor()  # up with a probability of what is cut off
        return torch.ldexp(rounded, exponent - ctx.bits).to(ctx.dtype), None, None


SIGNIFICANT = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def _dithered(given: Given, number: int, bits: int | None = None, double: bool = True) -> Given:
    """Gradients that reach the inputs dithered, to `bits` or to what the inputs have; the loss itself in float64."""

    def changed(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        wide = tensor.double() if double else tensor
        dithered: Tensor = _Dither.apply(wide, bits or SIGNIFICANT[tensor.dtype], number)
        return dithered

    return {name: changed(tensor) for name, tensor in given.items()}


def _reordered(given: Given) -> Given:
    """Every class under another number, in inputs and labels alike: sums over classes round otherwise."""
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
    """Logits times 1 + d; of a fused loss, what they are made of."""
    scaled = ("logits", "hidden", "bias")
    return {name: t * (1 + dose) if t is not None and name in scaled else t for name, t in given.items()}


def declared(name: str, reference: Mapping[str, Any], dose: float | None) -> dict[str, Any]:
    """What a control's cells are made from: the reference's declaration, and what was done to it."""
    return {**reference, "control": name} | ({"dose": dose} if name == DOSE else {})
