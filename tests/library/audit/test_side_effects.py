"""Side effects of a loss: each is reported where it occurs, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood_lab.audit.evaluate import Loss, same_bits
from likelihood_lab.audit.side_effects import changed_state, state_of
from likelihood_lab.categorical.inputs import LossFn
from tests.library.audit.shared import FUSED_BIAS, ON_TARGETS, SOFT, by_hand, logit_gradient, quick, with_bias

IGNORING = {"ignore_index": -100}
TARGETS = {"args": ON_TARGETS}
PROBS = {"args": ("probs", "labels")}
BIAS = {"args": FUSED_BIAS}


def effects(fn: LossFn, **settings: Any) -> tuple[str, ...]:
    return quick(fn, **settings).side_effects


def nll_of_probs(probs: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(probs.log(), labels)


@pytest.mark.parametrize(
    ("settings", "fn"),
    [
        ({}, F.cross_entropy), (IGNORING, F.cross_entropy), ({"tokens": True} | IGNORING, F.cross_entropy),
        (TARGETS, F.cross_entropy), ({"dtype": torch.bfloat16}, F.cross_entropy), (PROBS, nll_of_probs),
        (BIAS, with_bias),
    ],
    ids=["plain", "ignoring", "tokens", "one_hot", "bfloat16", "probs", "fused"],
)  # fmt: skip
def test_cross_entropy_has_no_side_effects(settings: dict[str, Any], fn: LossFn) -> None:
    assert effects(fn, **settings) == ()


def test_gradient_into_soft_targets_is_reported() -> None:
    assert effects(F.cross_entropy, **TARGETS, **SOFT) == ("gradient into target_probs",)
    assert effects(lambda z, t: F.cross_entropy(z, t.detach()), **TARGETS, **SOFT) == ()


# --- inputs


def then(change: LossFn, loss: LossFn = F.cross_entropy) -> LossFn:
    """A loss that changes its inputs without autograd's knowledge after its value is computed."""

    def overwriting(*given: Tensor) -> Tensor:
        value = loss(*(t.clone() for t in given))
        change(*(t.data for t in given))
        return value

    return overwriting


OVERWRITING: dict[str, tuple[LossFn, dict[str, Any], set[str]]] = {
    "logits": (then(lambda z, y: z.zero_()), {}, {"logits"}),
    "labels": (then(lambda z, y: y.zero_()), {}, {"labels"}),
    "target_probs": (then(lambda z, t: t.zero_()), TARGETS, {"target_probs"}),
    "both": (then(lambda z, y: (z.mul_(2), y.zero_())), {}, {"logits", "labels"}),
    "probs": (then(lambda p, y: p.zero_(), nll_of_probs), PROBS, {"probs"}),
    "hidden": (then(lambda *given: given[0].zero_(), with_bias), BIAS, {"hidden"}),
    "weight": (then(lambda *given: given[1].zero_(), with_bias), BIAS, {"weight"}),
    "bias": (then(lambda *given: given[2].zero_(), with_bias), BIAS, {"bias"}),
    "one entry": (then(lambda z, y: z.view(-1)[:1].add_(1) if z.is_contiguous() else None), {}, {"logits"}),
    "same numbers": (then(lambda z, y: z.mul_(1)), {}, set()),
}


@pytest.mark.parametrize(("fn", "settings", "names"), OVERWRITING.values(), ids=OVERWRITING)
def test_overwritten_inputs_are_named(fn: LossFn, settings: dict[str, Any], names: set[str]) -> None:
    found = quick(fn, **settings)
    assert set(found.side_effects) == {f"overwrites {name}" for name in names}
    assert len(found.side_effects) == len(names)


@pytest.mark.parametrize("name", ["labels", "target_probs", "logits"])
def test_overwritten_inputs_do_not_reach_the_next_candidate(name: str) -> None:
    def reference(logits: Tensor, labels: Tensor) -> Tensor:  # of this test alone, so that both share one audit
        return F.cross_entropy(logits, labels)

    fn, settings, _ = OVERWRITING[name]
    found = quick(fn, reference, **settings)
    assert found.objective == "identical"
    assert found.side_effects
    after = quick(F.cross_entropy, reference, **settings)
    assert (after.objective, after.side_effects) == ("identical", ())


def overwriting_backward(ctx: Any, upstream: Tensor) -> Tensor:
    return ctx.saved_tensors[0].data.copy_(upstream * logit_gradient(*ctx.saved_tensors))


def test_input_overwritten_in_backward_is_named() -> None:
    found = quick(by_hand(overwriting_backward))
    assert found.objective == "rounding"
    assert found.side_effects == ("overwrites logits", "second backward differs")


# --- randomness and state


def test_random_numbers_without_effect_are_noticed() -> None:
    def drawing(logits: Tensor, labels: Tensor) -> Tensor:
        torch.rand(1)
        return F.cross_entropy(logits, labels)

    with torch.random.fork_rng(devices=[]):
        assert effects(drawing) == ("consumes random numbers",)


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)], ids=["global", "own"])
def test_random_gradients_are_different(generator: torch.Generator | None) -> None:
    def dropping(logits: Tensor, labels: Tensor) -> Tensor:
        kept = torch.rand(labels.shape, generator=generator) < 0.9
        return (F.cross_entropy(logits, labels, reduction="none") * kept).mean()

    with torch.random.fork_rng(devices=[]):
        found = quick(dropping)
    assert found.objective == "different"
    assert ("consumes random numbers" in found.side_effects) == (generator is None)
    assert any(effect.startswith("equal calls differ (float") for effect in found.side_effects)


class Counting(nn.Module):
    """Counts its calls in a buffer, or in an attribute that its gradient depends on."""

    def __init__(self, persistent: bool = True, dtype: torch.dtype = torch.float32, drift: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=dtype), persistent=persistent)
        self.count, self.drift = 0, drift

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.count += 1
        if not self.drift:
            self.calls += 1
        return F.cross_entropy(logits * (1 + self.drift * self.count), labels)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_buffer_that_changes_is_named(persistent: bool, dtype: torch.dtype) -> None:
    found = quick(Counting(persistent, dtype))
    assert found.objective == "identical"
    assert found.side_effects == ("keeps state: calls",)


def test_state_in_an_attribute_makes_equal_calls_differ() -> None:
    found = quick(Counting(drift=1e-14))
    assert found.objective == "different"
    assert any(effect.startswith("equal calls differ") for effect in found.side_effects)
    assert not any(effect.startswith("keeps state") for effect in found.side_effects)


def test_changed_state_takes_nan_for_equal_to_nan() -> None:
    module = Counting()
    loss = Loss(module, ("logits", "labels"))
    before = state_of(loss)
    module.calls.fill_(torch.nan)
    assert changed_state(loss, before) == ["calls"]
    assert changed_state(loss, state_of(loss)) == []
    assert state_of(Loss(F.cross_entropy, ("logits", "labels"))) == {}


A = torch.tensor([1.0, torch.nan, 0.0])


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (A.clone(), True), (torch.tensor([1.0, torch.nan, -0.0]), True), (torch.tensor([1.0, torch.nan, 1e-45]), False),
        (A.double(), False), (A[None], False), (None, False),
    ],
)  # fmt: skip
def test_same_bits_are_equal_shapes_dtypes_and_numbers(other: Tensor | None, same: bool) -> None:
    assert same_bits(A, other) == same
    assert same_bits(None, None)


# --- backward


def once_only(ctx: Any, upstream: Tensor) -> Tensor:
    if ctx.calls > 1:
        raise RuntimeError("nothing left")
    return upstream * logit_gradient(*ctx.saved_tensors)


def adding_up(ctx: Any, upstream: Tensor) -> Tensor:
    return ctx.calls * upstream * logit_gradient(*ctx.saved_tensors)


@pytest.mark.parametrize(
    ("backward", "effect"), [(once_only, "refuses a second backward"), (adding_up, "second backward differs")]
)
def test_second_backward_is_reported(backward: LossFn, effect: str) -> None:
    assert effects(by_hand(backward)) == (effect,)


def test_missing_gradient_is_different() -> None:
    found = quick(lambda z, y: F.cross_entropy(z, y).detach())
    assert found.objective == "different"
    assert "no gradient" in found.side_effects
    assert "training would not move" in found.sentence


# --- bad input


def without_nan(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.nan_to_num(), labels)


def refusing_nan(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.isnan().any():
        raise FloatingPointError
    return F.cross_entropy(logits, labels)


def clamped(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.clamp_max(logits.shape[1] - 1))


def at_least_one(logits: Tensor, labels: Tensor) -> Tensor:
    count = (labels != -100).sum().clamp_min(1)
    return F.cross_entropy(logits, labels, reduction="sum") / count


NAN = "; the reference gives NaN, gradient NaN"
NUMBERS = "gives a number, gradient a number"
BAD_INPUTS: dict[str, tuple[LossFn, dict[str, Any], str | None]] = {
    "nan replaced": (without_nan, {}, f"nan_logits: {NUMBERS}{NAN}"),
    "nan refused": (refusing_nan, {}, f"nan_logits: raises{NAN}"),
    "label clamped": (clamped, {}, f"label_out_of_range: {NUMBERS}; the reference raises"),
    "without labels": (lambda z, t: F.cross_entropy(z, t), TARGETS, None),
    "all ignored": (at_least_one, IGNORING, "all_ignored: gives 0, gradient 0; the reference gives NaN, gradient 0"),
    "nothing ignored": (at_least_one, {}, None),
    "reference counts one": (
        F.cross_entropy, {"reference": at_least_one} | IGNORING,
        "all_ignored: gives NaN, gradient 0; the reference gives 0, gradient 0",
    ),
    "both clamp": (clamped, {"reference": clamped}, None),
    "both count one": (at_least_one, {"reference": at_least_one} | IGNORING, None),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "settings", "effect"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_response_is_compared(fn: LossFn, settings: dict[str, Any], effect: str | None) -> None:
    found = quick(fn, **settings)
    assert found.objective in ("identical", "rounding")
    assert found.side_effects == (() if effect is None else (effect,))


def test_bad_input_has_the_shape_of_the_audit() -> None:
    shapes: set[tuple[int, ...]] = set()

    def recording(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.isnan().any():
            shapes.add(tuple(logits.shape))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    assert effects(recording, tokens=True) == ()
    assert shapes == {(2, 2, 10)}


def test_bad_input_has_the_declared_dtype() -> None:
    def strict(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.dtype != torch.bfloat16:
            raise TypeError("bfloat16 only")
        return F.cross_entropy(logits, labels)

    assert effects(strict, dtype=torch.bfloat16) == ()
