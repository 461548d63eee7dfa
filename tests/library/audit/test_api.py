"""`check`, `assert_same_loss` and `capture`: words, sentences, numbers, and refused requests."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import likelihood_lab
from likelihood_lab import Finding, assert_same_loss, capture, check
from likelihood_lab.audit.rounding import CONSTANT, name_of
from likelihood_lab.audit.sensitivity import smallest_caught
from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.inputs import LossFn
from likelihood_lab.categorical.mutants import FAULT_SIZES, label_smoothing
from likelihood_lab.errors import UsageError
from tests.laboratory import CPU, shipped
from tests.library.audit.shared import (
    FUSED,
    FUSED_BIAS,
    NARROW,
    ON_TARGETS,
    SOFT,
    SUM,
    plain_linear,
    quick,
    smoothed_where,
    with_bias,
)

TORCH_HAS_FUSED = hasattr(F, "linear_cross_entropy")
KL = partial(F.kl_div, reduction="batchmean")
SOFT_KL: dict[str, Any] = {"args": ("log_probs", "target_probs"), **SOFT}

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # the point of kl_mean


def audit_shipped(name: str, **settings: Any) -> Finding:
    (formulation,) = shipped(name)
    return quick(formulation.instance(CPU, torch.float32), args=formulation.args, **settings)


shipped_finding = cache(audit_shipped)


def smoothed(logits: Tensor, labels: Tensor, epsilon: float = 0.1) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=epsilon)


def scaled(logits: Tensor, labels: Tensor, factor: float = 2.0) -> Tensor:
    return factor * F.cross_entropy(logits, labels)


@pytest.fixture
def few_mutants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure detection limits for one kind of fault alone, in audits that no other test shares."""
    monkeypatch.setattr("likelihood_lab.audit.api._audits", {})
    monkeypatch.setattr("likelihood_lab.audit.sensitivity.MUTANTS", {"label smoothing": label_smoothing})


# --- shipped losses


@pytest.mark.parametrize("name", ["nll", "ce", "ce_one_hot", "kl"])
def test_likelihood_losses_of_torch_are_identical(name: str) -> None:
    found = audit_shipped(name, num_classes=None)
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
def test_shipped_loss_has_its_word(name: str, word: str) -> None:
    found = shipped_finding(name)
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


def test_log_of_softmax_has_the_limit_of_plain_torch() -> None:
    """1 / (N p_y) overflows in the backward pass at 88.72 + ln N; the value is infinite where p_y underflows."""
    found = shipped_finding("nll_softmax")
    assert found.objective == "rounding"
    assert (found.domain.axis, found.domain.behaviour, found.domain.core) == ("gap", "gradient is NaN", False)
    breaks = bisected(lambda gap: not bool(log_of_softmax(gap)[1].isfinite().all()), 80, 110)
    assert breaks == pytest.approx(88.72 + math.log(4), abs=0.01)
    assert found.domain.limit == pytest.approx(breaks, rel=0.01)
    infinite = bisected(lambda gap: not bool(log_of_softmax(gap)[0].isfinite()), 80, 110)
    assert infinite == pytest.approx(103.97, abs=0.01)
    then = re.fullmatch(r"value is (?:wrong|infinite) from ([\d.]+)", found.domain.then or "")
    assert breaks < float(then[1]) < infinite * 1.01
    assert "90.1" in found.sentence


def test_domain_limit_in_float64() -> None:
    found = audit_shipped("nll_softmax", dtype=torch.float64)
    assert found.domain.limit == pytest.approx(math.log(torch.finfo(torch.float64).max) + math.log(4), rel=0.01)


def test_domain_limit_of_a_fused_loss_with_many_classes() -> None:
    found = quick(lambda h, w, y: F.nll_loss((h @ w.T).softmax(1).log(), y), args=FUSED, num_classes=(2000,))
    assert found.domain.axis == "gap"
    assert found.domain.limit == pytest.approx(90.1, rel=0.1)


def test_scale_of_kl_mean_is_one_over_c_to_12_digits() -> None:
    found = audit_shipped("kl_mean", num_classes=(2, 3, 10, 1000))
    assert found.objective == "scaled"
    assert found.scale.formula == "1/C"
    assert found.scale.by_classes == {c: float(f"{1 / c:.12g}") for c in (2, 3, 10, 1000)}
    assert "k = 1/C" in found.sentence


def test_sum_is_reweighted_by_the_batch_size() -> None:
    found = quick(SUM)
    assert found.objective == "reweighted"
    for low, high in found.scale.by_classes.values():
        assert low == pytest.approx(1, rel=1e-12)
        assert high == pytest.approx(300, rel=1e-12)
    assert "this is a sum (constant divisor), the reference is a mean (divides by rows)" in found.sentence
    assert found.evidence["reference_divides_by"] == "rows"


def weighted_mean(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    weight = torch.linspace(0.5, 2, logits.shape[1], dtype=logits.dtype)
    return F.cross_entropy(logits, labels, weight=weight, reduction=reduction)


@pytest.mark.parametrize(
    ("fn", "settings", "constant", "moves"),
    [(KL, SOFT_KL, -1.5659, True), (lambda z, y: F.cross_entropy(z, y) - 0.25, {}, -0.25, False)],
    ids=["minus an entropy", "constant"],
)
def test_offset_between_values(fn: LossFn, settings: dict[str, Any], constant: float, moves: bool) -> None:
    found = quick(fn, **settings)
    assert (found.objective, found.same) == ("offset", True)
    assert found.offset.constant == pytest.approx(constant, abs=1e-12 if not moves else 1e-4)
    assert found.offset.moves == moves
    assert ("moves with the targets" in found.sentence) == moves


def rounded_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Float32 noise in a loss that takes its inputs' last bits."""
    return (logits.float().logsumexp(1).to(logits.dtype) - logits.gather(1, labels[:, None])[:, 0]).mean()


@pytest.mark.usefixtures("few_mutants")
def test_bfloat16_detection_limit_says_what_is_missed() -> None:
    assert not quick(scaled, dtype=torch.bfloat16).same
    assert quick(partial(smoothed, epsilon=0.9), dtype=torch.bfloat16).objective == "different"
    missed = quick(smoothed, dtype=torch.bfloat16)
    assert missed.same
    assert missed.would_have_caught["label smoothing"] == {"bfloat16": None}


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


# --- words and sentences


def float32_inside(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def zero_for_ignored(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.clamp_min(0))


def raising(error: Exception) -> LossFn:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        raise error

    return loss


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOKENS: dict[str, Any] = {"tokens": True, "ignore_index": -100}
WORDS: dict[str, tuple[LossFn, dict[str, Any], str, str]] = {
    "factor 0.3": (partial(scaled, factor=0.3), {}, "scaled", "k = 0.3 in every batch"),
    **{f"1 + 1e{e}": (partial(scaled, factor=1 + 10.0**e), {}, "scaled", "k = 1") for e in (-6, -7, -9, -12, -13)},
    "factor -1": (partial(scaled, factor=-1.0), {}, "different", "the other way"),
    "weighted mean": (
        weighted_mean, {"reference": lambda z, y: weighted_mean(z, y, "sum") / len(y)}, "reweighted",
        "divides by sum of class weights, the reference divides by rows",
    ),
    "smoothing 1e-12": (partial(smoothed, epsilon=1e-12), {}, "different", "wrong in float64"),
    "smoothing 1e-12 in float32": (partial(smoothed, epsilon=1e-12), {"dtype": F32}, "same", ""),
    "smoothing 1e-5 in float32": (partial(smoothed, epsilon=1e-5), {"dtype": F32}, "different", ""),
    "float32 in a part": (rounded_softmax, {}, "rounding", "computes in float32"),
    "smoothing 1e-7 inside float32": (
        lambda z, y: smoothed(z.float(), y, epsilon=1e-7), {}, "different", "systematic part"
    ),
    **{
        f"float32 inside, C = {c}": (float32_inside, {"num_classes": c}, "rounding", "computes in float32")
        for c in (NARROW, (100,), (1000,))
    },
    "bfloat16 declared": (float32_inside, {"dtype": BF16}, "rounding", "closer to the truth than the reference"),
    "cross_entropy in bfloat16": (F.cross_entropy, {"dtype": BF16}, "identical", ""),
    "wrong value": (lambda z, y: F.cross_entropy(z, y) + z.detach().square().mean(), {}, "rounding", "value off by"),
    "bfloat16 inside": (lambda z, y: F.cross_entropy(z.to(BF16), y), {}, "different", f"dtype={BF16}"),
    "float16 inside": (lambda z, y: F.cross_entropy(z.to(F16), y), {}, "different", f"dtype={F16}"),
    "fused": (fused, {"args": FUSED}, "same", ""),
    "fused in bfloat16": (fused, {"args": FUSED, "dtype": BF16}, "same", ""),
    "linear": (plain_linear, {"args": FUSED}, "same", ""),
    "linear in bfloat16": (plain_linear, {"args": FUSED, "dtype": BF16}, "same", ""),
    **({"torch's fused": (F.linear_cross_entropy, {"args": FUSED}, "same", "")} if TORCH_HAS_FUSED else {}),
    **{
        f"{name} x {factor}": (partial(fused, wrong=name, factor=factor), {"args": FUSED}, "different", "")
        for name in ("weight", "hidden") for factor in (2.0, 1 + 1e-6)
    },
    "linear with bias": (with_bias, {"args": FUSED_BIAS}, "same", ""),
    "bias detached": (lambda h, w, b, y: with_bias(h, w, b.detach(), y), {"args": FUSED_BIAS}, "different", "bias"),
    "tuple": (lambda z, y: (F.cross_entropy(z, y), z.argmax(1)), {}, "identical", ""),
    "fused tuple": (lambda h, w, y: (plain_linear(h, w, y), None), {"args": FUSED}, "same", ""),
    "tokens": (lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()), TOKENS, "identical", ""),
    "tokens, flattened for torch": (F.cross_entropy, TOKENS, "identical", ""),
    "tokens over B*T": (
        lambda z, y: SUM(z.flatten(0, 1), y.flatten()) / y.numel(), TOKENS, "reweighted",
        "divides by B*T, the reference divides by valid targets",
    ),
    "ignore_index -1": (partial(F.cross_entropy, ignore_index=-1), {"ignore_index": -1}, "identical", ""),
    "ignore_index -100": (F.cross_entropy, {"ignore_index": -100}, "identical", ""),
    "ignored row as a target": (
        zero_for_ignored, {"ignore_index": -1}, "different", "where some targets are ignored"
    ),
    "no ignored rows": (zero_for_ignored, {}, "identical", ""),
    "each row": (partial(F.cross_entropy, reduction="none"), {}, "error", "reduction='mean'"),
    "ValueError": (raising(ValueError("not so\nsecond")), {}, "error", "failed on every batch: ValueError: not so"),
    **({} if torch.cuda.is_available() else {
        text: (raising(RuntimeError(text)), {}, "not_run", text) for text in ("no NVIDIA driver", "No module 'triton'")
    }),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "settings", "word", "text"), WORDS.values(), ids=WORDS)
def test_word_and_sentence(fn: LossFn, settings: dict[str, Any], word: str, text: str) -> None:
    found = quick(fn, **settings)
    assert found.same == (word in ("same", "identical", "rounding", "offset")), found.sentence
    assert word in ("same", found.objective), found.sentence
    assert text in "; ".join([found.sentence, *found.side_effects])
    assert "second" not in found.sentence
    if settings.get("ignore_index") is not None:
        assert f"targets ignored by {settings['ignore_index']}" in found.covered


@pytest.mark.parametrize("refused", NARROW)
def test_loss_that_refuses_one_c_is_audited_on_the_rest(refused: int) -> None:
    def fussy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        if logits.shape[1] == refused:
            raise ValueError("not that many")
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    found = quick(fussy)
    assert found.objective == "identical"
    assert "raises on 40 of 80 batches (ValueError: not that many)" in found.sentence
    assert any("ValueError: not that many" in entry and f"C={refused}" in entry for entry in found.not_covered)
    assert f"C = {12 - refused};" in found.covered[0]
    assert quick(partial(fussy, smoothing=1e-3)).objective == "different"


# --- captured batches


@pytest.fixture
def net(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5, bias=getattr(request, "param", True)))


def pictures(*lead: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*lead, 4, generator=generator), torch.randint(5, lead, generator=generator)


def test_capture_hard_labels_with_the_head(net: nn.Sequential) -> None:
    x, y = pictures(6)
    with capture(net) as batches:
        F.cross_entropy(net(x), y).backward()
        nn.CrossEntropyLoss()(net(x), y).backward()
    assert len(batches) == 2
    for batch in batches:
        assert torch.equal(batch.labels, y)
        assert torch.equal(batch.logits, net(x).detach().double())
        assert torch.equal(batch.target_probs, F.one_hot(y, 5).double())
        assert torch.equal(batch.hidden, net[:2](x).detach().double())
        assert torch.equal(batch.weight, net[2].weight.detach().double())
        assert torch.equal(batch.bias, net[2].bias.detach().double())
    found = quick(F.cross_entropy, batches=batches)
    assert "2 batches of the user's own" in found.covered
    assert "C = 2, 5, 10" in found.covered[0]
    assert "84 of 84 batches" in found.sentence
    assert quick(with_bias, args=FUSED_BIAS, batches=batches).same


def test_capture_finds_a_fault_of_its_batches_alone(net: nn.Module) -> None:
    x, y = pictures(6)
    with capture(net) as batches:
        F.cross_entropy(net(x), y)
    wrong_for_five = smoothed_where(lambda z, y: z.shape[1] == 5)
    with pytest.raises(AssertionError, match="captured rows, 6 x C=5"):
        assert_same_loss(wrong_for_five, batches=batches, num_classes=NARROW)


@pytest.mark.parametrize("net", [False], indirect=True)
def test_capture_soft_targets_log_probs_and_tokens(net: nn.Module) -> None:
    x, y = pictures(2, 3)
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
    assert tokens.hidden.shape == (2, 3, 8)
    assert tokens.bias is None
    assert nll.hidden is None  # log-probabilities are not what the layer gave
    found = quick(F.cross_entropy, tokens=True, ignore_index=-100, batches=[tokens])
    assert found.objective == "identical"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_capture_in_evaluation_and_its_maximum(net: nn.Module, mode: Callable[[], Any]) -> None:
    x, y = pictures(6)
    with mode(), capture(net, most=2) as batches:
        for _ in range(3):
            F.cross_entropy(net(x), y)
    assert len(batches) == 2
    assert "84 of 84 batches" in quick(F.cross_entropy, batches=batches).sentence


def test_capture_without_a_loss_says_how_to_add_one(net: nn.Module) -> None:
    x, y = pictures(6)
    with pytest.raises(UsageError, match=r"call \.add\(logits, target\)"), capture(net):
        net(x).logsumexp(1).mean()
    with capture(net) as batches:
        batches.add(net(x), y)
    assert batches[0].hidden is not None
    assert quick(F.cross_entropy, batches=batches).same
    for target in (torch.zeros(5, dtype=torch.int64), torch.zeros(6, 4)):
        with pytest.raises(UsageError, match="do not fit"), capture(net) as batches:
            batches.add(net(x), target)


def test_capture_raises_the_users_error_and_removes_hooks(net: nn.Module) -> None:
    with pytest.raises(ZeroDivisionError), capture(net):
        _ = 1 / 0
    assert not any(layer._forward_hooks for layer in net.modules())


def test_batches_without_a_head_are_refused_for_a_fused_loss() -> None:
    labels, valid = torch.tensor([0, 1, 4]), torch.ones(3, dtype=torch.bool)
    bare = AuditBatch("mine", torch.eye(3, 5).double(), labels, F.one_hot(labels, 5).double(), valid)
    with pytest.raises(UsageError, match="hidden and weight"):
        quick(plain_linear, args=FUSED, batches=[bare])


# --- assert_same_loss


@pytest.mark.parametrize("fn", [F.cross_entropy, lambda z, y: F.cross_entropy(z, y) + 1, rounded_softmax])
def test_assertion_passes_for_the_same_loss(fn: LossFn) -> None:
    assert_same_loss(fn, num_classes=NARROW)


WRONG: dict[str, tuple[LossFn, LossFn, dict[str, Any]]] = {
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
def test_assertion_fails_with_code_that_shows_two_gradients(
    fn: LossFn, reference: LossFn, settings: dict[str, Any]
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
        exec(lines, {"mine": fn, "reference": reference})  # noqa: S102 (a reader would paste it)
    first, second = printed.getvalue().splitlines()
    assert first != second


def test_assertion_names_a_batch_that_is_too_large_to_print() -> None:
    wrong_for_many = smoothed_where(lambda z, y: len(y) > 64, 0.1)
    with pytest.raises(AssertionError, match=r"# the smallest batch that shows it: float\d\d, .*300 x C=2"):
        assert_same_loss(wrong_for_many, num_classes=NARROW)


# --- contents of a finding


def test_detection_limits_of_the_narrow_grid() -> None:
    limits = quick(F.cross_entropy, num_classes=(3,)).would_have_caught
    assert {"label smoothing", "temperature 1 + d", "scale 1 + d", "class weight 1 + d"} <= limits.keys()
    for name in ("label smoothing", "scale 1 + d", "temperature 1 + d"):
        assert 1e-16 < (limits[name]["float64"] or 1) <= 1e-13
        assert 1e-8 < (limits[name]["float32"] or 1) <= 1e-5


@pytest.mark.parametrize("place", [*range(0, len(FAULT_SIZES), 5), len(FAULT_SIZES) - 1])
def test_smallest_caught_bisects(place: int) -> None:
    assert smallest_caught(lambda mutant, d: d >= FAULT_SIZES[place], label_smoothing) == FAULT_SIZES[place]
    assert smallest_caught(lambda mutant, d: False, label_smoothing) is None


@pytest.mark.usefixtures("few_mutants")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_detection_limit_is_what_a_candidate_meets(dtype: torch.dtype) -> None:
    """Smoothing of the size that is said to be caught is caught; a tenth of it is not."""
    size = quick(F.cross_entropy, dtype=dtype).would_have_caught["label smoothing"][name_of(dtype)]
    assert not quick(partial(label_smoothing, d=size), dtype=dtype, args=ON_TARGETS).same
    missed = quick(partial(label_smoothing, d=size / 10), dtype=dtype, args=ON_TARGETS)
    assert all(units <= CONSTANT for units in missed.evidence["units"].values())


def test_finding_as_text() -> None:
    limits = {"label smoothing": {"float32": 3e-6, "float64": None}}
    shown = replace(shipped_finding("nll_softmax"), detection_limits=lambda: limits).show()
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
    printing = quick(lambda z, y: (print("oh"), 1 / 0)[1])
    assert printing.show().splitlines()[0] == "error: failed on every batch: ZeroDivisionError: division by zero"
    assert "  side effect   prints: oh" in printing.show()


FINDINGS: dict[str, Callable[[], Finding]] = {
    "identical": lambda: quick(F.cross_entropy),
    "NaN everywhere": lambda: audit_shipped("kl_literal"),
    "reweighted": lambda: quick(SUM),
    "offset": lambda: quick(KL, **SOFT_KL),
    "low": lambda: quick(F.cross_entropy, dtype=torch.bfloat16),
    "error": lambda: quick(lambda z, y: 1 / 0),
    "fused": lambda: quick(plain_linear, args=FUSED),
}


@pytest.mark.usefixtures("few_mutants", "untouched_randomness")
@pytest.mark.parametrize("find", FINDINGS.values(), ids=FINDINGS)
def test_finding_as_strict_json(find: Callable[[], Finding]) -> None:
    """Neither the audit nor its detection limits draw from the global generator."""
    found = find()
    entry = found.as_json()
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert entry.keys() == {
        "objective", "scale", "offset", "domain", "normaliser", "side_effects", "would_have_caught", "covered",
        "not_covered", "sentence", "evidence",
    }  # fmt: skip
    assert (entry["objective"], entry["sentence"]) == (found.objective, found.sentence)
    assert bool(entry["would_have_caught"]) == (found.objective != "error")


def test_json_has_the_numbers_of_the_finding() -> None:
    entry = shipped_finding("kl_mean").as_json({})
    assert entry["scale"] == {"formula": "1/C", "by_classes": {"2": 0.5, "10": 0.1}}
    assert entry["domain"] == {"axis": "masked", "limit": 1.0, "behaviour": "value is NaN"}
    assert entry["normaliser"]["divides_by"] == "rows"
    assert entry["would_have_caught"] == {}
    assert entry["evidence"]["example"]["reference_gradient"] == pytest.approx([0.1, -0.8, 0.7])
    assert entry["evidence"]["example"]["gradient"] == pytest.approx([0.1 / 3, -0.8 / 3, 0.7 / 3])


def test_rho_separates_rounding_from_mathematics() -> None:
    rounding, wrong = shipped_finding("nll_logsumexp").evidence, quick(partial(smoothed, epsilon=1e-3)).evidence
    assert rounding["rho"] > 1e6
    assert wrong["rho"] == pytest.approx(1, rel=0.1)


# --- wrong requests


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"args": ("logit", "labels")}, "args names 'logit' (did you mean 'logits'?); choose from logits, "),
        ({"args": "logits"}, "args='logits'; give a tuple such as ('logits', 'labels')"),
        ({"args": ()}, "args is empty"),
        ({"args": ("hidden", "labels")}, "args=['hidden', 'labels']: a fused loss takes hidden and weight, both"),
        ({"reference_args": ("logits", "label")}, "reference_args names 'label' (did you mean 'labels'?)"),
        ({"dtype": torch.int64}, "dtype=torch.int64; give one of torch.bfloat16, float16, float32 and float64"),
        ({"num_classes": ()}, "num_classes=[]; give numbers of classes, each at least 2"),
        ({"num_classes": (10, 1)}, "num_classes=[10, 1]; give numbers of classes, each at least 2"),
        ({"num_classes": 10}, "num_classes=10; give a tuple such as (10,)"),
        ({"num_classes": (2.5,)}, "num_classes=[2.5]"),
        ({"batches": 3}, "batches=3; give the batches of `capture`"),
        ({"ignore_index": "a"}, "ignore_index='a'; give an integer such as -100, or nothing"),
        ({"device": "nowhere"}, "device=nowhere cannot be used here: "),
        ({"reference": lambda z, y: 1 / 0}, "the reference cannot be called on any batch: ZeroDivisionError"),
        ({"reference": lambda z, y: F.cross_entropy(z, y).detach()}, "scalar that is differentiable"),
        ({"reference": nn.CrossEntropyLoss}, "give a function, or an instance such as torch.nn.CrossEntropyLoss()"),
        ({"fn": nn.CrossEntropyLoss}, "give a function, or an instance such as torch.nn.CrossEntropyLoss()"),
        ({"fn": "cross_entropy"}, "fn is 'cross_entropy'; give a function"),
        ({"fn": nn.Linear(2, 2)}, "fn has trainable parameters of its own"),
    ],
)
def test_wrong_request_is_one_line_with_a_remedy(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)) as raised:
        quick(settings.pop("fn", F.cross_entropy), **settings)
    assert "\n" not in str(raised.value)


def test_package_exports_its_public_names() -> None:
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


# --- global state and the cache


@pytest.fixture
def fresh_reference() -> LossFn:
    """A reference without a cached audit."""
    return lambda logits, labels: F.cross_entropy(logits, labels)


@pytest.mark.usefixtures("few_mutants")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_check_runs_under_any_grad_mode_and_restores_it(mode: LossFn, fresh_reference: LossFn) -> None:
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = quick(F.cross_entropy, fresh_reference)
        assert found.objective == "identical"
        limits = found.would_have_caught
        assert quick(plain_linear, args=FUSED).same
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert limits == quick(F.cross_entropy).would_have_caught


def test_check_disables_autocast(fresh_reference: LossFn) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = quick(plain_linear, lambda h, w, y: fresh_reference(h @ w.T, y), args=FUSED, reference_args=FUSED)
    assert found.objective == "identical"


def test_cached_audit_is_not_used_for_another_request() -> None:
    assert quick(smoothed, smoothed).objective == "identical"
    assert quick(smoothed).objective == "different"
    assert "soft targets" in quick(F.cross_entropy, args=ON_TARGETS, **SOFT).covered
    assert "one-hot targets" in quick(F.cross_entropy, args=ON_TARGETS, reference_args=ON_TARGETS).covered
    assert "C = 2; " in quick(F.cross_entropy, num_classes=(2,)).covered[0]
    assert "C = 3; " in quick(F.cross_entropy, num_classes=(3,)).covered[0]
    assert "; float32; cpu" in quick(F.cross_entropy, dtype=torch.float32).covered[0]


def test_reference_may_be_unhashable() -> None:
    class Reference(partial):
        __hash__ = None

    assert quick(F.cross_entropy, Reference(F.cross_entropy)).objective == "identical"


def test_printed_text_is_a_side_effect_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = quick(lambda z, y: (print("\n  hello\nagain"), F.cross_entropy(z, y))[1])
    assert found.objective == "identical"
    assert found.side_effects == ("prints: hello",)
    assert capsys.readouterr().out == ""


def test_module_tensors_follow_the_dtype_in_a_copy() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.ones(10))
    assert quick(loss, num_classes=(10,)).same
    assert loss.weight.dtype == torch.float32


@pytest.mark.parametrize("module", ["api", "capture", "finding"])
def test_docstring_examples_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"likelihood_lab.audit.{module}"))
    assert results.attempted > 0
    assert results.failed == 0
