"""What a loss does besides returning a value; each effect is found where it is and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood_lab.audit.api import check
from likelihood_lab.audit.evaluate import Loss, same_bits
from likelihood_lab.audit.finding import Finding
from likelihood_lab.audit.side_effects import changed_state, state_of
from likelihood_lab.categorical.batches import BatchShape

ON_TARGETS = ("logits", "target_probs")
FUSED = ("hidden", "weight", "bias", "labels")
SOFT: dict[str, Any] = {"args": ON_TARGETS, "reference_args": ON_TARGETS, "soft_targets": True}
IGNORING = {"ignore_index": -100}


def quick(fn: Callable[..., Any], reference: Callable[..., Any] = F.cross_entropy, **settings: Any) -> Finding:
    return check(fn, reference, **({"num_classes": (2, 10)} | settings))


def effects(fn: Callable[..., Any], **settings: Any) -> tuple[str, ...]:
    return quick(fn, **settings).side_effects


def one(found: tuple[str, ...]) -> str:
    (effect,) = found
    return effect


@pytest.mark.parametrize(
    "settings",
    [
        {}, IGNORING, {"tokens": True} | IGNORING, {"args": ON_TARGETS}, {"dtype": torch.bfloat16},
        {"args": ("probs", "labels"), "fn": lambda p, y: F.nll_loss(p.log(), y)},
        {"args": FUSED, "fn": lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y)},
    ],
    ids=["plain", "ignoring", "tokens", "one_hot", "bfloat16", "probs", "fused"],
)  # fmt: skip
def test_torchs_cross_entropy_does_nothing_besides(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    assert effects(settings.pop("fn", F.cross_entropy), **settings) == ()


def test_torchs_soft_cross_entropy_passes_a_gradient_into_the_targets_and_does_nothing_else() -> None:
    assert effects(F.cross_entropy, **SOFT) == ("gradient into target_probs",)
    assert effects(lambda z, t: F.cross_entropy(z, t.detach()), **SOFT) == ()


# --- inputs


def then(change: Callable[..., Any], loss: Callable[..., Tensor] = F.cross_entropy) -> Callable[..., Tensor]:
    """A loss that does something to its inputs behind autograd's back, once the value is computed."""

    def overwriting(*given: Tensor) -> Tensor:
        value = loss(*(t.clone() for t in given))
        change(*(t.data for t in given))
        return value

    return overwriting


def test_inputs_overwritten_in_forward_are_named() -> None:
    assert effects(then(lambda z, y: z.zero_())) == ("overwrites logits",)
    assert effects(then(lambda z, y: y.zero_())) == ("overwrites labels",)
    assert effects(then(lambda z, t: t.zero_()), args=ON_TARGETS) == ("overwrites target_probs",)
    both = effects(then(lambda z, y: (z.mul_(2), y.zero_())))
    assert set(both) == {"overwrites logits", "overwrites labels"}
    made = effects(then(lambda p, y: p.zero_(), lambda p, y: F.nll_loss(p.log(), y)), args=("probs", "labels"))
    assert made == ("overwrites probs",)


@pytest.mark.parametrize("place", range(3))
def test_an_overwritten_input_of_a_fused_loss_is_named(place: int) -> None:
    fn = then(lambda *given: given[place].zero_(), lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y))
    assert effects(fn, args=FUSED) == (f"overwrites {FUSED[place]}",)


def test_one_overwritten_entry_is_enough_and_writing_the_same_number_is_nothing() -> None:
    assert effects(then(lambda z, y: z.view(-1)[:1].add_(1) if z.is_contiguous() else None)) == ("overwrites logits",)
    assert effects(then(lambda z, y: z.mul_(1))) == ()


@pytest.mark.parametrize(
    "fn",
    [then(lambda z, y: y.zero_()), then(lambda z, t: t.zero_()), then(lambda z, y: z.zero_())],
    ids=["labels", "target_probs", "logits"],
)
def test_a_loss_that_overwrites_its_inputs_costs_the_next_one_nothing(
    fn: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    def reference(logits: Tensor, labels: Tensor) -> Tensor:  # of this test alone, so that both meet in one audit
        return F.cross_entropy(logits, labels)

    args = ON_TARGETS if "target_probs" in request.node.name else ("logits", "labels")
    found = quick(fn, reference, args=args)
    assert found.objective == "identical"
    assert found.side_effects
    after = quick(F.cross_entropy, reference, args=args)
    assert (after.objective, after.side_effects) == ("identical", ())


class OverwritingBackward(torch.autograd.Function):
    """The gradient is written over the logits when it is asked for."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        gradient = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
        return logits.data.copy_(upstream[0] * gradient / len(labels)), None


def test_an_input_overwritten_in_backward_is_named_and_spoils_the_second() -> None:
    found = quick(OverwritingBackward.apply)
    assert found.objective == "rounding"
    assert found.side_effects == ("overwrites logits", "second backward differs")


# --- randomness and state


def test_random_numbers_of_the_global_generator_are_noticed_though_they_change_nothing() -> None:
    def drawing(logits: Tensor, labels: Tensor) -> Tensor:
        torch.rand(1)
        return F.cross_entropy(logits, labels)

    with torch.random.fork_rng(devices=[]):
        assert one(effects(drawing)) == "consumes random numbers"


def test_random_gradients_are_different_whoever_draws_the_numbers() -> None:
    own = torch.Generator().manual_seed(0)

    def dropping(logits: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        kept = torch.rand(labels.shape, generator=generator) < 0.9
        return (F.cross_entropy(logits, labels, reduction="none") * kept).mean()

    with torch.random.fork_rng(devices=[]):
        found = quick(dropping)
    assert found.objective == "different"
    assert "consumes random numbers" in found.side_effects
    private = quick(partial(dropping, generator=own))
    assert private.objective == "different"
    assert "consumes random numbers" not in private.side_effects
    assert any(effect.startswith("equal calls differ (float") for effect in private.side_effects)


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
def test_a_buffer_that_changes_is_named(persistent: bool, dtype: torch.dtype) -> None:
    found = quick(Counting(persistent, dtype))
    assert found.objective == "identical"
    assert found.side_effects == ("keeps state: calls",)


def test_state_in_an_attribute_shows_as_equal_calls_that_differ() -> None:
    found = quick(Counting(drift=1e-14))
    assert found.objective == "different"
    assert any(effect.startswith("equal calls differ") for effect in found.side_effects)
    assert not any(effect.startswith("keeps state") for effect in found.side_effects)


def test_state_is_compared_bit_for_bit_with_nan_equal_to_nan() -> None:
    module = Counting()
    loss = Loss(module, ("logits", "labels"))
    before = state_of(loss)
    module.calls.fill_(torch.nan)
    assert changed_state(loss, before) == ["calls"]
    before = state_of(loss)
    assert changed_state(loss, before) == []
    assert state_of(Loss(F.cross_entropy, ("logits", "labels"))) == {}


def test_equal_bits_are_equal_shapes_types_and_numbers() -> None:
    a = torch.tensor([1.0, torch.nan, 0.0])
    assert same_bits(a, a.clone())
    assert same_bits(a, torch.tensor([1.0, torch.nan, -0.0]))
    assert not same_bits(a, torch.tensor([1.0, torch.nan, 1e-45]))
    assert not same_bits(a, a.double())
    assert not same_bits(a, a[None])
    assert not same_bits(a, None)
    assert same_bits(None, None)


# --- backward


class OnceOnly(torch.autograd.Function):
    """Lets go of what its backward needs, once it has been used."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.kept = [(logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(labels)]
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        if not ctx.kept:
            raise RuntimeError("nothing left")
        return upstream[0] * ctx.kept.pop(), None


class AddingUp(torch.autograd.Function):
    """Adds each gradient to the last."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.once = (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / len(labels)
        ctx.total = torch.zeros_like(logits)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        ctx.total = ctx.total + upstream[0] * ctx.once
        return ctx.total, None


def test_a_second_backward_that_is_refused_or_differs() -> None:
    assert one(effects(OnceOnly.apply)) == "refuses a second backward"
    assert one(effects(AddingUp.apply)) == "second backward differs"


def test_no_gradient_at_all_is_different_and_says_so() -> None:
    found = quick(lambda z, y: F.cross_entropy(z, y).detach())
    assert found.objective == "different"
    assert "no gradient" in found.side_effects
    assert "training would not move" in found.sentence


def test_what_is_printed_is_told_by_its_first_line() -> None:
    assert one(effects(lambda z, y: (print("loss is", 3), F.cross_entropy(z, y))[1])) == "prints: loss is 3"


# --- policies


def of(found: tuple[str, ...], question: str) -> str | None:
    return next((effect for effect in found if effect.startswith(f"{question}: ")), None)


def without_nan(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.nan_to_num(), labels)


def refusing_nan(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.isnan().any():
        raise FloatingPointError
    return F.cross_entropy(logits, labels)


def test_nan_logits_that_are_swallowed_or_refused() -> None:
    swallowed = of(effects(without_nan), "nan_logits")
    assert swallowed is not None
    assert swallowed.startswith("nan_logits: gives a number, gradient ")
    assert swallowed.endswith("; the reference gives NaN, gradient NaN")
    assert of(effects(refusing_nan), "nan_logits") == "nan_logits: raises; the reference gives NaN, gradient NaN"


def clamped(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.clamp_max(logits.shape[1] - 1))


def test_labels_out_of_range_that_are_taken_for_others() -> None:
    found = of(effects(clamped), "label_out_of_range")
    assert found == "label_out_of_range: gives a number, gradient a number; the reference raises"
    assert of(effects(lambda z, t: F.cross_entropy(z, t), args=ON_TARGETS), "label_out_of_range") is None


def at_least_one(logits: Tensor, labels: Tensor) -> Tensor:
    count = (labels != -100).sum().clamp_min(1)
    return F.cross_entropy(logits, labels, reduction="sum") / count


def test_nothing_but_ignored_targets() -> None:
    found = quick(at_least_one, **IGNORING)
    assert found.objective in ("identical", "rounding")
    said = of(found.side_effects, "all_ignored")
    assert said == "all_ignored: gives 0, gradient 0; the reference gives NaN, gradient 0"
    assert effects(at_least_one) == ()  # not asked where nothing is to be ignored


def test_the_reference_sets_the_policy() -> None:
    assert quick(F.cross_entropy, at_least_one, **IGNORING).side_effects == (
        "all_ignored: gives NaN, gradient 0; the reference gives 0, gradient 0",
    )
    assert quick(clamped, clamped).side_effects == ()
    assert quick(at_least_one, at_least_one, **IGNORING).side_effects == ()


def test_shapes_of_the_questions_are_the_audits() -> None:
    """Token losses are asked with tokens, fused ones with hidden, weight and bias."""
    seen: set[tuple[int, ...]] = set()

    def looking(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.isnan().any():
            seen.add(tuple(logits.shape))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    assert quick(looking, tokens=True).side_effects == ()
    assert seen == {(2, 2, 10)}
    assert BatchShape((10,), tokens=True).tokens


def test_policies_are_asked_in_the_precision_that_was_declared() -> None:
    def strict(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.dtype != torch.bfloat16:
            raise TypeError("bfloat16 only")
        return F.cross_entropy(logits, labels)

    assert quick(strict, dtype=torch.bfloat16).side_effects == ()
