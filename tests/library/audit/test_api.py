"""`likelihood_lab.check` and `assert_same_loss`: the word, the sentence, the numbers, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import likelihood_lab
from likelihood_lab import Finding, assert_same_loss, capture, check
from likelihood_lab.audit.rounding import CONSTANT
from likelihood_lab.audit.sensitivity import smallest_caught
from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.mutants import FAULT_SIZES, label_smoothing
from likelihood_lab.errors import UsageError
from tests.laboratory import CPU, shipped

NARROW = (2, 10)
FUSED = ("hidden", "weight", "labels")
ON_TARGETS = ("logits", "target_probs")
LOGS_ON_TARGETS = ("log_probs", "target_probs")
SOFT: dict[str, Any] = {"reference_args": ON_TARGETS, "soft_targets": True}

KL = partial(F.kl_div, reduction="batchmean")
SUM = partial(F.cross_entropy, reduction="sum")

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # kl_mean's very point


def quick(fn: Callable[..., Any], reference: Callable[..., Any] = F.cross_entropy, **settings: Any) -> Finding:
    """`check` on few classes."""
    return check(fn, reference, **({"num_classes": NARROW} | settings))


def audited(name: str, **settings: Any) -> Finding:
    """A shipped formulation."""
    (formulation,) = shipped(name)
    return quick(formulation.instance(CPU, torch.float32), args=formulation.args, **settings)


def smoothed(logits: Tensor, labels: Tensor, epsilon: float = 0.1) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=epsilon)


def scaled(logits: Tensor, labels: Tensor, factor: float = 2.0) -> Tensor:
    return factor * F.cross_entropy(logits, labels)


@pytest.fixture
def few_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one kind of difference on the ladder, for tests that are not about its rungs."""
    monkeypatch.setattr("likelihood_lab.audit.sensitivity.MUTANTS", {"label smoothing": label_smoothing})


# --- the textbook's formulations


@pytest.mark.parametrize("name", ["nll", "ce", "ce_one_hot", "kl"])
def test_torchs_spellings_of_the_likelihood_are_identical_on_every_number_of_classes(name: str) -> None:
    found = audited(name, num_classes=None)
    assert found.objective == "identical"
    assert found.same
    assert "bit for bit in 80 of 80 batches" in found.sentence
    assert "C = 2, 10, 1000, 50000; 1 to 300 rows; float32, float64; cpu" in found.covered[0]
    assert not found.side_effects
    assert found.evidence["r64"] == 0


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("nll_logsumexp", "rounding"), ("kl_mean", "scaled"), ("log_likelihood", "reweighted"),
        ("likelihood_product", "reweighted"), ("brier", "different"), ("double_softmax", "different"),
        ("label_smoothing", "different"), ("nll_on_probs", "different"), ("reverse_kl", "different"),
        ("kl_literal", "different"),
    ],
)  # fmt: skip
def test_the_other_shipped_formulations(name: str, word: str) -> None:
    found = audited(name)
    assert found.objective == word
    assert found.same == (word == "rounding")


def log_of_softmax(gap: float, rows: int = 4, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Value and gradient, in float32, of rows whose label's logit lies `gap` below one other and the rest far below."""
    logits = torch.full((rows, classes), -15.0)
    logits[:, 0], logits[:, 1] = 0.0, -gap
    leaf = logits.requires_grad_()
    value = F.nll_loss(leaf.softmax(1).log(), torch.ones(rows, dtype=torch.int64))
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def bisected(fails: Callable[[float], bool], low: float, high: float) -> float:
    assert not fails(low)
    assert fails(high)
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    return high


def test_the_logarithm_of_a_softmax_is_rounding_up_to_the_gap_where_plain_torch_breaks() -> None:
    """1 / (N p_y) overflows in the backward pass at 88.72 + ln N; the value is infinite where p_y underflows."""
    found = audited("nll_softmax")
    assert found.objective == "rounding"
    assert found.domain is not None
    assert (found.domain.axis, found.domain.behaviour, found.domain.core) == ("gap", "gradient is NaN", False)
    breaks = bisected(lambda gap: not bool(log_of_softmax(gap)[1].isfinite().all()), 80, 110)
    assert breaks == pytest.approx(88.72 + math.log(4), abs=0.01)
    assert found.domain.limit == pytest.approx(breaks, rel=0.01)
    infinite = bisected(lambda gap: not bool(log_of_softmax(gap)[0].isfinite()), 80, 110)
    assert infinite == pytest.approx(103.97, abs=0.01)
    assert found.domain.then is not None
    then = re.fullmatch(r"value is (?:wrong|infinite) from ([\d.]+)", found.domain.then)
    assert then is not None
    assert breaks < float(then[1]) < infinite * 1.01
    assert "90.1" in found.sentence


def test_the_limit_in_float64_is_where_float64_breaks() -> None:
    found = audited("nll_softmax", dtype=torch.float64)
    assert found.domain is not None
    assert found.domain.limit == pytest.approx(math.log(torch.finfo(torch.float64).max) + math.log(4), rel=0.01)


def test_kl_by_its_default_reduction_is_one_over_c_to_12_digits_at_every_c() -> None:
    found = audited("kl_mean", num_classes=(2, 3, 10, 1000))
    assert found.objective == "scaled"
    assert found.scale is not None
    assert found.scale.formula == "1/C"
    assert found.scale.by_classes == {c: float(f"{1 / c:.12g}") for c in (2, 3, 10, 1000)}
    assert "k = 1/C" in found.sentence


def test_a_constant_factor_is_scaled_and_named() -> None:
    found = quick(partial(scaled, factor=0.3))
    assert (found.objective, found.same) == ("scaled", False)
    assert found.scale is not None
    assert found.scale.formula == "0.3"


@pytest.mark.parametrize("exponent", [-6, -7, -9, -12, -13])
def test_a_factor_close_to_1_is_scaled_as_soon_as_float64_resolves_it(exponent: int) -> None:
    found = quick(partial(scaled, factor=1 + 10.0**exponent))
    assert found.objective == "scaled", found.sentence


def test_a_turned_gradient_is_different() -> None:
    found = quick(partial(scaled, factor=-1.0))
    assert found.objective == "different"
    assert "the other way" in found.sentence


def test_a_sum_is_reweighted_by_the_batch_size_and_says_what_each_divides_by() -> None:
    found = quick(SUM)
    assert found.objective == "reweighted"
    assert found.scale is not None
    for low, high in found.scale.by_classes.values():  # type: ignore[misc]
        assert low == pytest.approx(1, rel=1e-12)
        assert high == pytest.approx(300, rel=1e-12)
    assert "this is a sum (constant divisor), the reference is a mean (divides by rows)" in found.sentence


def weights_of(logits: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, logits.shape[1], dtype=logits.dtype)


def weighted_mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, weight=weights_of(logits))


def weighted_sum_over_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, weight=weights_of(logits), reduction="sum") / len(labels)


def test_a_weighted_mean_against_a_weighted_sum_over_n_is_reweighted_by_the_sum_of_weights() -> None:
    found = quick(weighted_mean, weighted_sum_over_rows)
    assert found.objective == "reweighted"
    assert found.normaliser is not None
    assert found.normaliser.divides_by == "sum of class weights"
    assert "divides by sum of class weights, the reference divides by rows" in found.sentence
    assert found.evidence["reference_divides_by"] == "rows"


# --- values


def test_soft_cross_entropy_and_kl_differ_by_an_offset_that_moves_with_the_targets() -> None:
    found = quick(KL, args=LOGS_ON_TARGETS, **SOFT)
    assert (found.objective, found.same) == ("offset", True)
    assert found.offset is not None
    assert found.offset.moves
    assert found.offset.constant < -0.5  # minus an entropy
    assert "moves with the targets" in found.sentence


def test_a_constant_added_is_an_offset_that_does_not_move() -> None:
    found = quick(lambda z, y: F.cross_entropy(z, y) - 0.25)
    assert found.objective == "offset"
    assert found.offset is not None
    assert found.offset.constant == pytest.approx(-0.25, abs=1e-12)
    assert not found.offset.moves


def test_right_gradients_under_a_wrong_value_are_rounding_with_the_value_among_the_side_effects() -> None:
    found = quick(lambda z, y: F.cross_entropy(z, y) + z.detach().square().mean())
    assert found.objective == "rounding"
    assert any(effect.startswith("value off by") for effect in found.side_effects)


# --- precision


def test_smoothing_by_1e_12_shows_in_float64_alone() -> None:
    found = quick(partial(smoothed, epsilon=1e-12))
    assert found.objective == "different"
    assert "wrong in float64" in found.sentence
    assert quick(partial(smoothed, epsilon=1e-12), dtype=torch.float32).same


def test_smoothing_by_1e_5_shows_in_float32() -> None:
    found = quick(partial(smoothed, epsilon=1e-5), dtype=torch.float32)
    assert found.objective == "different"
    assert "; float32; cpu" in found.covered[0]


@pytest.mark.parametrize("num_classes", [NARROW, (100,), (1000,)], ids=str)
def test_a_loss_that_computes_in_float32_is_rounding_and_says_so(num_classes: tuple[int, ...]) -> None:
    found = quick(lambda z, y: F.cross_entropy(z.float(), y), num_classes=num_classes)
    assert found.objective == "rounding"
    assert "computes in float32" in found.sentence
    assert found.evidence["computes_in"] == "float32"
    assert found.evidence["systematic_part"] < 3


def test_smoothing_by_1e_7_is_caught_inside_a_loss_that_computes_in_float32() -> None:
    found = quick(lambda z, y: smoothed(z.float(), y, epsilon=1e-7))
    assert found.objective == "different"
    assert "systematic part" in found.sentence


def rounded_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Float32 noise in a loss that takes its inputs' last bits."""
    return (logits.float().logsumexp(1).to(logits.dtype) - logits.gather(1, labels[:, None])[:, 0]).mean()


def test_a_loss_that_rounds_in_part_is_judged_by_float32_too() -> None:
    assert quick(rounded_softmax).objective == "rounding"


def test_bfloat16_where_declared_is_rounding_and_compared_with_the_reference_and_the_truth() -> None:
    found = quick(lambda z, y: F.cross_entropy(z.float(), y), dtype=torch.bfloat16)
    assert found.objective == "rounding"
    assert "closer to the truth than the reference" in found.sentence
    assert found.evidence["gradient_error"] < found.evidence["reference_gradient_error"]
    assert quick(F.cross_entropy, dtype=torch.bfloat16).objective == "identical"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_inside_is_different_and_the_sentence_says_how_to_declare_it(dtype: torch.dtype) -> None:
    found = quick(lambda z, y: F.cross_entropy(z.to(dtype), y))
    assert found.objective == "different"
    assert f"dtype={dtype}" in found.sentence


def test_a_large_mistake_is_seen_through_bfloat16_and_a_small_one_is_said_to_be_missed(few_mutants: None) -> None:
    assert not quick(scaled, dtype=torch.bfloat16).same
    assert quick(partial(smoothed, epsilon=0.9), dtype=torch.bfloat16).objective == "different"
    missed = quick(smoothed, dtype=torch.bfloat16)
    assert missed.same
    assert missed.would_have_caught["label smoothing"] == {"bfloat16": None}


# --- fused losses


def plain_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels)


class Fused(torch.autograd.Function):
    """Mean cross-entropy behind a linear layer, its gradients by hand; one of them off by a factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, wrong: str, factor: float) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.factors = {"hidden": 1.0, "weight": 1.0} | {wrong: factor}
        return plain_linear(hidden, weight, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        probs = (hidden @ weight.T).softmax(1)
        by_logits = upstream[0] * (probs - F.one_hot(labels, len(weight)).to(probs)) / len(labels)
        by_hidden, by_weight = by_logits @ weight, by_logits.T @ hidden
        return ctx.factors["hidden"] * by_hidden, ctx.factors["weight"] * by_weight, None, None, None


def fused(hidden: Tensor, weight: Tensor, labels: Tensor, wrong: str = "weight", factor: float = 1.0) -> Tensor:
    value: Tensor = Fused.apply(hidden, weight, labels, wrong, factor)
    return value


@pytest.mark.parametrize("fn", [plain_linear, fused], ids=["by hand", "autograd.Function"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_honest_fused_losses_are_the_same(fn: Callable[..., Any], dtype: torch.dtype | None) -> None:
    found = quick(fn, args=FUSED, dtype=dtype)
    assert found.same, found.sentence


def test_torchs_own_fused_loss_is_the_same() -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    assert quick(F.linear_cross_entropy, args=FUSED).same


@pytest.mark.parametrize("wrong", ["weight", "hidden"])
@pytest.mark.parametrize("factor", [2.0, 1 + 1e-6])
def test_one_wrong_gradient_of_a_fused_loss_is_caught_though_the_others_are_right(wrong: str, factor: float) -> None:
    found = quick(partial(fused, wrong=wrong, factor=factor), args=FUSED)
    assert found.objective == "different"


def test_a_bias_is_judged_where_the_loss_takes_one() -> None:
    args = ("hidden", "weight", "bias", "labels")
    assert quick(lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y), args=args).same
    forgotten = quick(lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b.detach()), y), args=args)
    assert forgotten.objective == "different"
    assert "bias" in forgotten.sentence


def test_fused_losses_of_large_vocabularies_have_their_domain_searched_too() -> None:
    found = quick(lambda h, w, y: F.nll_loss((h @ w.T).softmax(1).log(), y), args=FUSED, num_classes=(2000,))
    assert found.domain is not None
    assert found.domain.axis == "gap"
    assert found.domain.limit == pytest.approx(90.1, rel=0.1)


def test_the_first_of_several_answers_is_the_objective() -> None:
    assert quick(lambda z, y: (F.cross_entropy(z, y), z.argmax(1))).objective == "identical"
    assert quick(lambda h, w, y: (plain_linear(h, w, y), None), args=FUSED).same


# --- tokens and ignored targets


def test_token_losses_with_ignored_targets() -> None:
    settings: dict[str, Any] = {"tokens": True, "ignore_index": -100}
    flat = quick(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()), **settings)
    assert flat.objective == "identical"
    assert "targets ignored by -100" in flat.covered
    assert quick(F.cross_entropy, **settings).objective == "identical"  # flattened for torch
    counting = quick(lambda z, y: SUM(z.flatten(0, 1), y.flatten()) / y.numel(), **settings)
    assert counting.objective == "reweighted"
    assert "divides by B*T, the reference divides by valid targets" in counting.sentence


@pytest.mark.parametrize("ignore_index", [-1, -100])
def test_the_default_reference_ignores_what_is_to_be_ignored(ignore_index: int) -> None:
    mine = partial(F.cross_entropy, ignore_index=ignore_index)
    assert quick(mine, ignore_index=ignore_index).objective == "identical"


def test_a_loss_that_takes_an_ignored_row_for_a_target_differs_only_there() -> None:
    def zero_for_ignored(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels.clamp_min(0))

    found = quick(zero_for_ignored, ignore_index=-1)
    assert found.objective == "different"
    assert "where some targets are ignored" in found.sentence
    assert quick(zero_for_ignored).objective == "identical"


# --- what cannot be run


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Found no NVIDIA driver on your system"), ImportError("No module named 'triton'")],
    ids=["driver", "triton"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_loss_that_wants_a_gpu_was_not_run(error: Exception) -> None:
    def wants_a_gpu(logits: Tensor, labels: Tensor) -> Tensor:
        raise error

    found = quick(wants_a_gpu)
    assert (found.objective, found.same) == ("not_run", False)
    assert str(error) in found.sentence


def test_a_loss_that_always_raises_is_an_error_with_its_first_line() -> None:
    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        raise ValueError("no such thing\nsecond line")

    found = quick(broken)
    assert (found.objective, found.same) == ("error", False)
    assert "ValueError: no such thing" in found.sentence
    assert "second" not in found.sentence


def test_a_loss_for_each_row_is_an_error_that_names_the_cure() -> None:
    found = quick(partial(F.cross_entropy, reduction="none"))
    assert found.objective == "error"
    assert "reduction='mean'" in found.sentence


@pytest.mark.parametrize("refused", [2, 10])
def test_a_loss_that_refuses_one_c_is_judged_on_the_rest_and_says_so(refused: int) -> None:
    def fussy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        if logits.shape[1] == refused:
            raise ValueError("not that many")
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    found = quick(fussy)
    assert found.objective == "identical"
    assert any("ValueError: not that many" in entry and f"C={refused}" in entry for entry in found.not_covered)
    assert f"C = {12 - refused};" in found.covered[0]
    assert quick(partial(fussy, smoothing=1e-3)).objective == "different"


# --- batches of the user's own


def model(bias: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5, bias=bias))


def pictures(*lead: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(*lead, 4, generator=draw), torch.randint(5, lead, generator=draw)


def test_hard_labels_are_captured_with_the_head_that_made_the_logits() -> None:
    net, (x, y) = model(), pictures(6)
    with capture(net) as batches:
        F.cross_entropy(net(x), y).backward()
        nn.CrossEntropyLoss()(net(x), y).backward()
    assert len(batches) == 2
    for batch in batches:
        assert torch.equal(batch.labels, y)
        assert torch.equal(batch.logits, net(x).detach().double())
        assert torch.equal(batch.target_probs, F.one_hot(y, 5).double())
        assert batch.hidden is not None
        assert torch.equal(batch.hidden, net[:2](x).detach().double())  # type: ignore[index]
        assert batch.weight is not None
        assert batch.bias is not None
    found = quick(F.cross_entropy, batches=batches)
    assert "2 batches of the user's own" in found.covered
    assert "C = 2, 5, 10" in found.covered[0]
    assert "84 of 84 batches" in found.sentence
    args = ("hidden", "weight", "bias", "labels")
    assert quick(lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y), args=args, batches=batches).same


def test_a_mistake_that_shows_in_captured_batches_alone_is_found() -> None:
    net, (x, y) = model(), pictures(6)
    with capture(net) as batches:
        F.cross_entropy(net(x), y)

    def wrong_for_five(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=1e-3 if logits.shape[1] == 5 else 0.0)

    assert not quick(wrong_for_five, batches=batches).same
    with pytest.raises(AssertionError, match="captured rows, 6 x C=5"):
        assert_same_loss(wrong_for_five, batches=batches, num_classes=NARROW)


def test_soft_targets_log_probabilities_and_tokens_are_captured() -> None:
    net, (x, y) = model(bias=False), pictures(2, 3)
    soft = torch.full((6, 5), 0.2)
    with capture(net) as batches:
        F.cross_entropy(net(x).flatten(0, 1), soft)
        F.kl_div(net(x).flatten(0, 1).log_softmax(1), soft, reduction="batchmean")
        F.nll_loss(net(x).log_softmax(-1).movedim(-1, 1), y)
        F.cross_entropy(net(x).movedim(-1, 1), y.masked_fill(y == 0, -100))
    soft_ce, kl, nll, tokens = batches
    assert torch.equal(soft_ce.target_probs, soft.double())
    torch.testing.assert_close(kl.logits.softmax(1), soft_ce.logits.softmax(1))
    assert nll.logits.shape == (2, 3, 5)
    assert torch.equal(nll.labels, y)
    assert torch.equal(tokens.valid, y != 0)
    assert not tokens.target_probs[y == 0].any()
    assert tokens.hidden is not None
    assert tokens.hidden.shape == (2, 3, 8)
    assert tokens.bias is None
    assert nll.hidden is None  # log-probabilities are not what the layer gave
    found = quick(F.cross_entropy, tokens=True, ignore_index=-100, batches=[tokens])
    assert found.objective == "identical"


def test_no_more_batches_are_kept_than_asked_for() -> None:
    net, (x, y) = model(), pictures(6)
    with capture(net, most=2) as batches:
        for _ in range(3):
            F.cross_entropy(net(x), y)
    assert len(batches) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_batches_of_an_evaluation_are_as_good(mode: Callable[[], Any]) -> None:
    net, (x, y) = model(), pictures(6)
    with mode(), capture(net) as batches:
        F.cross_entropy(net(x), y)
    found = quick(F.cross_entropy, batches=batches)
    assert "82 of 82 batches" in found.sentence


def test_a_block_without_a_loss_that_is_listened_to_says_how_to_add_one() -> None:
    net, (x, y) = model(), pictures(6)
    with pytest.raises(UsageError, match=r"call \.add\(logits, target\)"), capture(net):
        net(x).logsumexp(1).mean()
    with capture(net) as batches:
        batches.add(net(x), y)
    assert batches[0].hidden is not None
    assert quick(F.cross_entropy, batches=batches).same


@pytest.mark.parametrize("target", [torch.zeros(5, dtype=torch.int64), torch.zeros(6, 4)], ids=["labels", "probs"])
def test_shapes_that_do_not_fit_are_refused(target: Tensor) -> None:
    net, (x, _) = model(), pictures(6)
    with pytest.raises(UsageError, match="do not fit"), capture(net) as batches:
        batches.add(net(x), target)


def test_an_error_inside_the_block_is_the_users_own_and_the_hooks_are_gone() -> None:
    net, (x, _) = model(), pictures(6)
    with pytest.raises(ZeroDivisionError), capture(net):
        _ = 1 / 0
    assert not any(layer._forward_hooks for layer in net.modules())
    net(x)


def test_batches_without_a_head_are_refused_for_a_fused_loss() -> None:
    logits, labels = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 4])
    valid = torch.ones(3, dtype=torch.bool)
    bare = AuditBatch("mine", logits.double(), labels, F.one_hot(labels, 5).double(), valid)
    with pytest.raises(UsageError, match="hidden and weight"):
        quick(plain_linear, args=FUSED, batches=[bare])


# --- assert_same_loss


@pytest.mark.parametrize("fn", [F.cross_entropy, lambda z, y: F.cross_entropy(z, y) + 1, rounded_softmax])
def test_the_assertion_passes_for_the_same_loss(fn: Callable[..., Any]) -> None:
    assert_same_loss(fn, num_classes=NARROW)


WRONG: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "smoothed": (smoothed, F.cross_entropy, {}),
    "barely smoothed": (partial(smoothed, epsilon=1e-9), F.cross_entropy, {}),
    "scaled": (scaled, F.cross_entropy, {}),
    "sum": (SUM, F.cross_entropy, {}),
    "kl of probabilities": (KL, F.cross_entropy, {"args": ("probs", "target_probs")}),
    "swapped arguments": (lambda y, z: smoothed(z, y), F.cross_entropy, {"args": ("labels", "logits")}),
    "soft": (scaled, F.cross_entropy, {"args": ON_TARGETS, **SOFT}),
    "another reference": (F.cross_entropy, smoothed, {}),
    "tokens": (lambda z, y: 2 * F.cross_entropy(z.flatten(0, 1), y.flatten()), F.cross_entropy, {"tokens": True}),
    "ignored": (lambda z, y: 2 * F.cross_entropy(z, y, ignore_index=-1), F.cross_entropy, {"ignore_index": -1}),
}


@pytest.mark.parametrize(("fn", "reference", "settings"), WRONG.values(), ids=WRONG)
def test_the_assertion_fails_with_the_sentence_and_lines_that_show_two_gradients(
    fn: Callable[..., Any], reference: Callable[..., Any], settings: dict[str, Any]
) -> None:
    settings = {"num_classes": NARROW} | settings
    with pytest.raises(AssertionError) as raised:
        assert_same_loss(fn, reference, **settings)
    head, lines = str(raised.value).split("\n\n")
    found = check(fn, reference, **settings)
    assert head == f"{found.objective}: {found.sentence}"
    assert len(lines.splitlines()) <= 6
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(lines, {"mine": fn, "reference": reference})  # noqa: S102 (what a reader would paste)
    first, second = printed.getvalue().splitlines()
    assert first != second


def test_where_no_small_batch_shows_it_the_assertion_says_which_does() -> None:
    def wrong_for_many(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.1 if len(labels) > 64 else 0.0)

    with pytest.raises(AssertionError, match=r"# the smallest batch that shows it: float\d\d, .*300 x C=2"):
        assert_same_loss(wrong_for_many, num_classes=NARROW)


# --- what a finding carries


def test_every_finding_says_how_small_a_difference_would_have_been_caught() -> None:
    power = quick(F.cross_entropy).would_have_caught
    assert {"label smoothing", "temperature 1 + d", "scale 1 + d", "class weight 1 + d"} <= power.keys()
    for name in ("label smoothing", "scale 1 + d", "temperature 1 + d"):
        assert 1e-16 < (power[name]["float64"] or 1) <= 1e-13
        assert 1e-8 < (power[name]["float32"] or 1) <= 1e-5


@pytest.mark.parametrize("place", [*range(0, len(FAULT_SIZES), 5), len(FAULT_SIZES) - 1])
def test_the_smallest_rung_that_is_caught_is_found(place: int) -> None:
    assert smallest_caught(lambda mutant, d: d >= FAULT_SIZES[place], label_smoothing) == FAULT_SIZES[place]
    assert smallest_caught(lambda mutant, d: False, label_smoothing) is None


@pytest.mark.usefixtures("few_mutants")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_power_is_what_a_candidate_meets(dtype: torch.dtype) -> None:
    """Smoothing of the size that is said to be caught is; a tenth of it is not."""
    size = quick(F.cross_entropy, dtype=dtype).would_have_caught["label smoothing"][str(dtype).removeprefix("torch.")]
    assert size is not None
    assert not quick(partial(label_smoothing, d=size), dtype=dtype, args=ON_TARGETS).same
    missed = quick(partial(label_smoothing, d=size / 10), dtype=dtype, args=ON_TARGETS)
    assert all(units <= CONSTANT for units in missed.evidence["units"].values())


def test_the_finding_as_text() -> None:
    power = {"label smoothing": {"float32": 3e-6, "float64": None}}
    shown = replace(audited("nll_softmax"), detection_limits=lambda: power).show()
    assert shown.startswith("rounding: ")
    assert "\n  domain        from the label's logit 90.16 below the largest on, the gradient is NaN" in shown
    for line in (
        "  divides by    rows; accumulated micro-batches are right by a mean of equal micro-batches",
        "  covered       one-hot targets",
        "  not covered   soft targets",
        "  would have caught, from  float32  float64",
        "    label smoothing      3e-06     not .1",
    ):
        assert line in shown.splitlines()
    talking = quick(lambda z, y: (print("oh"), 1 / 0)[1])
    assert talking.show().splitlines()[0] == "error: failed on every batch: ZeroDivisionError: division by zero"
    assert "  side effect   prints: oh" in talking.show()


FINDINGS: dict[str, Callable[[], Finding]] = {
    "identical": lambda: quick(F.cross_entropy),
    "NaN everywhere": lambda: audited("kl_literal"),
    "reweighted": lambda: quick(SUM),
    "offset": lambda: quick(KL, args=LOGS_ON_TARGETS, **SOFT),
    "low": lambda: quick(F.cross_entropy, dtype=torch.bfloat16),
    "error": lambda: quick(lambda z, y: 1 / 0),
    "fused": lambda: quick(plain_linear, args=FUSED),
}


@pytest.mark.usefixtures("few_mutants")
@pytest.mark.parametrize("find", FINDINGS.values(), ids=FINDINGS)
def test_the_finding_as_strict_json(find: Callable[[], Finding]) -> None:
    found = find()
    entry = found.as_json()
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert entry.keys() == {
        "objective", "scale", "offset", "domain", "normaliser", "side_effects", "would_have_caught", "covered",
        "not_covered", "sentence", "evidence",
    }  # fmt: skip
    assert entry["objective"] == found.objective
    assert entry["sentence"] == found.sentence


def test_json_has_the_numbers_of_the_finding() -> None:
    entry = audited("kl_mean").as_json({})
    assert entry["scale"] == {"formula": "1/C", "by_classes": {"2": 0.5, "10": 0.1}}
    assert entry["domain"] == {"axis": "masked", "limit": 1.0, "behaviour": "value is NaN"}
    assert entry["normaliser"]["divides_by"] == "rows"
    assert entry["would_have_caught"] == {}
    assert entry["evidence"]["example"]["reference_gradient"] == pytest.approx([0.1, -0.8, 0.7])
    assert entry["evidence"]["example"]["gradient"] == pytest.approx([0.1 / 3, -0.8 / 3, 0.7 / 3])


def test_rounding_shrinks_from_float32_to_float64_and_mathematics_does_not() -> None:
    rounding, wrong = audited("nll_logsumexp").evidence, quick(partial(smoothed, epsilon=1e-3)).evidence
    assert rounding["rho"] > 1e6
    assert wrong["rho"] == pytest.approx(1, rel=0.1)


# --- wrong requests


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"args": ("logit", "labels")}, "args names 'logit' (did you mean 'logits'?); choose from logits, "),
        ({"args": "logits"}, "args='logits'; give a tuple such as ('logits', 'labels')"),
        ({"args": ()}, "args is empty"),
        ({"reference_args": ("logits", "label")}, "reference_args names 'label' (did you mean 'labels'?)"),
        ({"dtype": torch.int64}, "dtype=torch.int64; give one of torch.bfloat16, float16, float32 and float64"),
        ({"num_classes": ()}, "num_classes=[]; give numbers of classes, each at least 2"),
        ({"num_classes": (10, 1)}, "num_classes=[10, 1]; give numbers of classes, each at least 2"),
        ({"num_classes": 10}, "num_classes=10; give a tuple such as (10,)"),
        ({"num_classes": (2.5,)}, "num_classes=[2.5]"),
        ({"device": "nowhere"}, "device=nowhere cannot be used here: "),
        ({"reference": lambda z, y: 1 / 0}, "the reference cannot be called on any batch: ZeroDivisionError"),
        ({"reference": lambda z, y: F.cross_entropy(z, y).detach()}, "scalar that is differentiable"),
        ({"reference": nn.CrossEntropyLoss}, "give a function, or an instance such as torch.nn.CrossEntropyLoss()"),
        ({"fn": nn.CrossEntropyLoss}, "give a function, or an instance such as torch.nn.CrossEntropyLoss()"),
        ({"fn": "cross_entropy"}, "fn is 'cross_entropy'; give a function"),
    ],
)
def test_a_wrong_request_is_one_line_that_says_what_to_do(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as raised:
        quick(settings.pop("fn", F.cross_entropy), **settings)
    assert "\n" not in str(raised.value)


def test_the_shim_names_what_it_has() -> None:
    from likelihood_lab.audit import api
    from likelihood_lab.categorical import losses
    from likelihood_lab.stats.outcome import compare

    assert likelihood_lab.check is api.check
    assert likelihood_lab.capture is api.capture
    assert likelihood_lab.losses is losses
    assert likelihood_lab.compare is compare
    assert all(hasattr(likelihood_lab, name) for name in likelihood_lab.__all__)
    with pytest.raises(AttributeError, match="likelihood_lab has no 'chek'; it has Finding, assert_same_loss, "):
        _ = likelihood_lab.chek


# --- a good guest


@pytest.mark.usefixtures("untouched_randomness", "few_mutants")
@pytest.mark.parametrize("name", ["identical", "low", "fused"])
def test_a_check_draws_nothing_of_the_global_generator(name: str) -> None:
    assert FINDINGS[name]().would_have_caught


@pytest.mark.usefixtures("few_mutants")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_check_runs_under_any_mode_and_leaves_it(mode: Callable[[], Any]) -> None:
    def fresh_reference(logits: Tensor, labels: Tensor) -> Tensor:  # so that no earlier audit is found again
        return F.cross_entropy(logits, labels)

    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = quick(F.cross_entropy, fresh_reference)
        assert found.objective == "identical"
        power = found.would_have_caught
        assert quick(plain_linear, args=FUSED).same
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert power == quick(F.cross_entropy).would_have_caught


def test_autocast_around_a_check_does_not_decide() -> None:
    def fresh_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return plain_linear(hidden, weight, labels)

    with torch.autocast("cpu", torch.bfloat16):
        found = quick(plain_linear, fresh_reference, args=FUSED, reference_args=FUSED)
    assert found.objective == "identical"


def test_an_audit_of_another_request_is_not_found_again() -> None:
    assert quick(smoothed, smoothed).objective == "identical"
    assert quick(smoothed).objective == "different"
    assert "soft targets" in quick(F.cross_entropy, args=ON_TARGETS, **SOFT).covered
    assert "one-hot targets" in quick(F.cross_entropy, args=ON_TARGETS, reference_args=ON_TARGETS).covered
    assert "C = 2; " in quick(F.cross_entropy, num_classes=(2,)).covered[0]
    assert "C = 3; " in quick(F.cross_entropy, num_classes=(3,)).covered[0]


def test_a_reference_that_cannot_be_hashed_is_taken_all_the_same() -> None:
    class Reference:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels)

    assert quick(F.cross_entropy, Reference()).objective == "identical"


def test_what_a_loss_prints_is_a_side_effect_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = quick(lambda z, y: (print("\n  hello\nagain"), F.cross_entropy(z, y))[1])
    assert found.objective == "identical"
    assert "prints: hello" in found.side_effects
    assert capsys.readouterr().out == ""


def test_a_modules_own_numbers_follow_the_precision_and_the_module_itself_is_left_alone() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(10))
    assert quick(loss, num_classes=(10,)).same
    assert loss.weight is not None
    assert loss.weight.dtype == torch.float32
