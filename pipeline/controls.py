"""What a trial trains beside its candidates to know what its own answers are worth.

replay   the reference again, in another slot: anything but the same bits means that this platform is not deterministic
placebo  the reference with other roundings, twice: in float32 once in float64 and cast back, once with its classes in
         another order; in bfloat16 with gradients from float64, rounded up or down at random, by two draws.
         What they do is what rounding does: the measure for the candidates' early steps, and equivalent by construction
dose     the reference with its logits times 1 + d: a difference of a known size, which the study has to notice
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.formulations import Formulation, LossFn, derive

REPLAY, DOSE = "replay", "dose"
IN_FLOAT64, REORDERED = "placebo_float64", "placebo_reordered"
DITHERED, DITHERED_AGAIN = "placebo_dithered", "placebo_dithered_again"
NAMES = (REPLAY, IN_FLOAT64, REORDERED, DITHERED, DITHERED_AGAIN, DOSE)
BY_PRECISION = {"float32": (IN_FLOAT64, REORDERED), "bf16_mixed": (DITHERED, DITHERED_AGAIN), "float64": ()}
"""The placebos of each precision; in float64 the audit decides, and none is needed."""

_MADE_OF_LOGITS = ("logits", "log_probs", "probs")


def control(name: str, reference: Formulation, dose: float | None = None) -> Formulation:
    """The control of that name as a formulation of its own.

    Args:
        dose: d of the negative control.
    """
    if name == REPLAY:
        return Formulation(name, reference.args, reference.make)
    wrap: Mapping[str, Callable[[LossFn], LossFn]] = {
        IN_FLOAT64: lambda fn: _Rewritten(fn, reference.args, _in_float64),
        DITHERED: lambda fn: _Rewritten(fn, reference.args, partial(_dithered, shift=0.0)),
        DITHERED_AGAIN: lambda fn: _Rewritten(fn, reference.args, partial(_dithered, shift=0.5)),
        REORDERED: lambda fn: _Rewritten(fn, reference.args, _reordered),
        DOSE: lambda fn: _Rewritten(fn, reference.args, lambda given: _dosed(given, dose or 0.0)),
    }
    return Formulation(name, base_args(reference.args), lambda: wrap[name](reference.make()))


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
    """To float64; the gradient comes back in the precision that came in, rounded up or down at random without bias.

    Two draws from one stream are made different by a shift: u and u + shift mod 1.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shift: float) -> Tensor:
        ctx.dtype, ctx.shift = tensor.dtype, shift
        return tensor.double()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        gradient = upstream[0]
        nearest = gradient.to(ctx.dtype)
        towards = torch.where(gradient > nearest, torch.inf, -torch.inf).to(ctx.dtype)
        other = torch.nextafter(nearest, towards)
        gap = other.double() - nearest.double()
        share = torch.where(gap != 0, (gradient - nearest.double()) / gap, 0.0).nan_to_num(0.0)
        drawn = (torch.rand_like(gradient) + ctx.shift) % 1
        return torch.where(drawn < share, other, nearest), None


def _dithered(given: Given, shift: float) -> Given:
    return {name: t if t is None or not t.is_floating_point() else _Dither.apply(t, shift) for name, t in given.items()}


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
    """Logits times 1 + d; of a fused loss, its hidden activations."""
    return {name: t * (1 + dose) if t is not None and name in ("logits", "hidden") else t for name, t in given.items()}


def declared(name: str, reference: Mapping[str, Any], dose: float | None) -> dict[str, Any]:
    """What a control's cells are made from: the reference's declaration, and what was done to it."""
    return {**reference, "control": name} | ({"dose": dose} if name == DOSE else {})
