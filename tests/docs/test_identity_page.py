"""Check docs/identity.html: its numerics against torch, its embedded cases, and that it is one file.

Bounds are in the audit's unit, u (1 + M + sqrt(C)), with M the largest finite |z| or |log p| (audit/rounding.py). To
first order, log p = (z - max) - log sum exp(z - max) is off by at most u (2 |log p| + 8), or 2.7 units as M >= log 3.
Values and gradients add at most 3 units. The page and torch may err in opposite directions, so 12 units, the audit's
own constant, bound the difference. The observed maximum is below 2; this test allows 4.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from py_mini_racer import MiniRacer
from torch import Tensor

from experiments.audit.cases_for_page import PAGE, SENTENCES, cases, embedded, recorded_rows, with_cases
from experiments.audit.catalogue import CATALOGUE, markdown
from likelihood_lab.audit.rounding import CONSTANT, rows_of, unit_roundoff
from likelihood_lab.categorical.inputs import derive
from likelihood_lab.categorical.losses import literal_kl_divergence
from tests.laboratory import CPU, shipped

PAGE_TEXT = PAGE.read_text("utf-8")
UNITS = 4.0
PRECISIONS = {"FLOAT64": torch.float64, "FLOAT32": torch.float32}
INF = math.inf
MINUS = "\N{MINUS SIGN}"
State = dict[str, Any]
Objective = Callable[[Tensor, Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # KL's default reduction


# --- the page's script in an engine


def script(name: str) -> str:
    (text,) = re.findall(rf'<script id="{name}">\n(.*?)</script>', PAGE_TEXT, re.DOTALL)
    return str(text)


def start(source: str) -> MiniRacer:
    made = MiniRacer()
    made.eval(source)
    return made


@pytest.fixture(scope="module")
def engine() -> MiniRacer:
    """JavaScript engine with the page's numerics and no document."""
    return start(script("numerics"))


def value_of(engine: MiniRacer, expression: str) -> Any:
    """Return the value of an expression. NaN and infinity, which JSON lacks, travel as words."""

    def restore(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: restore(item) for key, item in x.items()}
        if isinstance(x, list):
            return [restore(item) for item in x]
        return float(x[1:].replace("Infinity", "inf")) if isinstance(x, str) and x.startswith("#") else x

    words = "(key, x) => typeof x === 'number' && !Number.isFinite(x) ? `#${x}` : x"
    return restore(json.loads(str(engine.eval(f"JSON.stringify({expression}, {words})"))))


def evaluate(engine: MiniRacer, states: Iterable[State], precision: str) -> list[dict[str, Any]]:
    """Evaluate states on the page; `json.dumps` writes NaN and Infinity as JavaScript does."""
    results: list[dict[str, Any]] = value_of(engine, f"{json.dumps(list(states))}.map((s) => evaluate(s, {precision}))")
    return results


# --- states


def state(logits: Any, weights: Any = (1, 0, 0), smoothing: float = 0.0) -> State:
    return {"logits": [float(z) for z in logits], "weights": [float(w) for w in weights], "smoothing": smoothing}


def _families() -> dict[str, list[State]]:
    """Return seeded states of every kind that the controls reach, with ties, saturation and shifts."""
    draw = np.random.default_rng(0)
    one_hot = list(np.eye(3))
    soft = [(0.9, 0.1, 0), (0, 0.5, 0.5), (0.01, 0.98, 0.01), (2, 1, 1), *(draw.dirichlet([1, 1, 1]) for _ in range(4))]
    plain = [np.zeros(3), np.array([5, 5, -5])]
    plain += [draw.normal(size=3) * scale for scale in (0.01, 0.5, 3, 10) for _ in range(8)]
    far = [(0, gap, rest) for gap in (17, 40, 80, 86, 90, 95, 100, 120, 150) for rest in (0, gap - 1, -100)]
    far += [(-z, -a, -b) for z, a, b in far] + [(150, 150, 150), (-150, -150, -149), (150, -150, 0), (-150, 150, -150)]
    masked = [(2, 1, -INF), (-INF, 1, 2), (0, -INF, -120), (-INF, -INF, 3), (-INF, -INF, -INF)]
    smoothed = itertools.product([*plain[::5], *far[::5]], [*one_hot, *soft[:3]], (1e-3, 0.1, 1.0))
    return {
        "one-hot": [state(z, y) for z, y in itertools.product(plain, one_hot)],
        "soft": [state(z, y) for z, y in itertools.product(plain, soft)],
        "saturated": [state(z, y) for z, y in itertools.product(far, one_hot)],
        "saturated soft": [state(z, y) for z, y in itertools.product(far, soft)],
        "smoothed": [state(z, y, e) for z, y, e in smoothed],
        "masked": [state(z, y, e) for z, y, e in itertools.product(masked, [*one_hot, *soft], (0.0, 0.1))],
        "no label": [state(z, (0, 0, 0)) for z in plain[:3]],
    }


FAMILIES = _families()


# --- the same in torch


def targets(given: State, dtype: torch.dtype) -> Tensor:
    """Target probabilities [1, C]; torch smooths probabilities by the same expression."""
    weights = torch.tensor([given["weights"]], dtype=torch.float64).to(dtype)
    target_probs = weights / weights.sum(1, keepdim=True)
    smoothing: float = given["smoothing"]
    return target_probs * (1 - smoothing) + smoothing / 3 if smoothing else target_probs


def declared(name: str) -> Objective:
    """Return a loss of `conf/loss/` as a function of logits and target probabilities."""
    (formulation,) = shipped(name)
    instances = {dtype: formulation.instance(CPU, dtype) for dtype in PRECISIONS.values()}

    def objective(logits: Tensor, target_probs: Tensor) -> Tensor:
        inputs = derive(formulation.args, logits) | {"target_probs": target_probs, "labels": target_probs.argmax(1)}
        return formulation.objective(instances[logits.dtype], [inputs[arg] for arg in formulation.args])

    return objective


TORCH: dict[str, Objective] = {
    "nll": declared("nll"),
    "ce": declared("ce_one_hot"),
    "kl": declared("kl"),
    "kl-mean": declared("kl_mean"),
    "log-of-softmax": lambda logits, target_probs: -(target_probs * logits.softmax(1).log()).sum(1).mean(),
    "kl-literal": lambda logits, target_probs: literal_kl_divergence(logits.softmax(1), target_probs),
}


def logits_of(given: State, dtype: torch.dtype) -> Tensor:
    return torch.tensor([given["logits"]], dtype=torch.float64).to(dtype)


def by_torch(given: State, objective: Objective, dtype: torch.dtype) -> tuple[float, list[float]]:
    logits = logits_of(given, dtype).requires_grad_()
    value = objective(logits, targets(given, dtype))
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient[0].tolist()


@cache
def all_by_torch(family: str, precision: str) -> list[dict[str, tuple[float, list[float]]]]:
    dtype = PRECISIONS[precision]
    return [{key: by_torch(given, fn, dtype) for key, fn in TORCH.items()} for given in FAMILIES[family]]


def unit(given: State, dtype: torch.dtype) -> float:
    """The audit's unit for this row."""
    labels = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    rows = rows_of(logits_of(given, dtype).double(), labels, torch.tensor([True]), None)
    return float(unit_roundoff(dtype) * rows.reach)


def subnormal_step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def lost_bits(given: State, dtype: torch.dtype) -> float:
    """Error of log p for a subnormal p: two implementations of exp, each off by one subnormal step, divided by p."""
    log_probs = logits_of(given, torch.float64).log_softmax(1)[0]
    labelled = log_probs[targets(given, torch.float64)[0] > 0].tolist()
    return 2 * subnormal_step(dtype) * math.exp(min(700.0, -min(filter(math.isfinite, labelled), default=0.0)))


def difference(x: float, y: float) -> float:
    """Return |x - y|: 0 for two NaN or two equal infinities, infinite if only one is not finite."""
    if math.isnan(x) or math.isnan(y):
        return 0.0 if math.isnan(x) and math.isnan(y) else INF
    return 0.0 if x == y else abs(x - y)


def test_difference_with_values_that_are_not_finite() -> None:
    assert difference(math.nan, math.nan) == difference(INF, INF) == difference(0.0, -0.0) == 0
    assert difference(math.nan, 1) == difference(1, INF) == difference(INF, -INF) == difference(math.nan, INF) == INF


def check_spellings(given: State, page: dict[str, Any], known: dict[str, Any], dtype: torch.dtype) -> None:
    """Check the value and gradient of each loss, and their relations to each other."""
    allowed = UNITS * unit(given, dtype)
    spellings = page["spellings"]
    for key, (value, gradient) in known.items():
        found, where = spellings[key], f"{key} of {given}: {spellings[key]}"
        if key == "nll" and set(page["targetProbs"]) != {0, 1}:
            assert found["word"] == "undefined"
            assert found.keys() == {"word", "why"}
            continue
        bits = lost_bits(given, dtype) if key in ("log-of-softmax", "kl-literal") else 0.0
        assert difference(found["value"], value) <= allowed + bits, (where, value)
        assert max(map(difference, found["gradient"], gradient)) <= allowed, (where, gradient)


def check_parts(given: State, page: dict[str, Any], dtype: torch.dtype) -> None:
    """Check the probabilities, p - y, the entropy and the unit that the losses are made of."""
    logits, target_probs, allowed = logits_of(given, dtype), targets(given, dtype), UNITS * unit(given, dtype)
    roundoff = unit_roundoff(dtype)
    assert page["logits"] == logits[0].tolist()
    assert page["targetProbs"] == pytest.approx(target_probs[0].tolist(), abs=2 * roundoff, nan_ok=True)
    for p, expected in zip(page["probs"], logits.softmax(1)[0].tolist(), strict=True):
        assert math.isnan(expected) or difference(p, expected) <= allowed * expected + 2 * subnormal_step(dtype)
    assert max(map(difference, page["logProbs"], logits.log_softmax(1)[0].tolist())) <= allowed
    assert max(map(difference, page["direction"], (logits.softmax(1) - target_probs)[0].tolist())) <= allowed
    assert difference(page["entropy"], torch.special.entr(target_probs).sum().item()) <= 4 * roundoff
    if any(map(math.isfinite, given["logits"])):
        assert page["unit"] == pytest.approx(unit(given, dtype), rel=1e-6)


def check_family(engine: MiniRacer, family: str, precision: str) -> None:
    pages = evaluate(engine, FAMILIES[family], precision)
    for given, page, known in zip(FAMILIES[family], pages, all_by_torch(family, precision), strict=True):
        check_spellings(given, page, known, PRECISIONS[precision])
        check_parts(given, page, PRECISIONS[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_numerics_are_those_of_torch(engine: MiniRacer, family: str, precision: str) -> None:
    check_family(engine, family, precision)


def test_smoothing_is_that_of_torchs_cross_entropy() -> None:
    """`targets`, with which the page is compared, smooths labels as torch does."""
    for given in FAMILIES["smoothed"]:
        logits, bare = logits_of(given, torch.float64), targets(given | {"smoothing": 0.0}, torch.float64)
        expected = F.cross_entropy(logits, bare, label_smoothing=given["smoothing"]).item()
        value, _ = by_torch(given, TORCH["ce"], torch.float64)
        assert difference(value, expected) <= unit(given, torch.float64)


def test_log_of_softmax_has_the_value_of_nll_softmax() -> None:
    for given in FAMILIES["one-hot"]:
        (value, _), (expected, _) = (
            by_torch(given, fn, torch.float32) for fn in (TORCH["log-of-softmax"], declared("nll_softmax"))
        )
        assert difference(value, expected) <= unit(given, torch.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nll_ce_and_kl_have_equal_gradients(engine: MiniRacer, precision: str) -> None:
    """The gradients are equal bit for bit, and the values of KL and CE differ by the entropy."""
    states = [given for name, family in FAMILIES.items() if name not in ("masked", "no label") for given in family]
    for page in evaluate(engine, states, precision):
        nll, ce, kl = (page["spellings"][key] for key in ("nll", "ce", "kl"))
        assert ce["gradient"] == kl["gradient"] == nll.get("gradient", ce["gradient"])
        assert abs(kl["value"] - ce["value"] + page["entropy"]) <= UNITS * page["unit"]


def test_states_reach_every_way_to_break() -> None:
    """Without this the tests above could compare ordinary numbers only."""
    seen = set()
    for known in itertools.chain.from_iterable(all_by_torch(family, "FLOAT32") for family in FAMILIES):
        for key, (value, gradient) in known.items():
            for part, x in [("value", value), *(("gradient", g) for g in gradient)]:
                seen.add((key, part, "finite" if math.isfinite(x) else str(x)))
    kinds = [("value", "finite"), ("value", "inf"), ("value", "nan"), ("gradient", "finite"), ("gradient", "nan")]
    assert {(key, *kind) for key in TORCH for kind in kinds} <= seen
    assert {("log-of-softmax", "gradient", "inf"), ("kl-literal", "gradient", "inf")} <= seen


@pytest.mark.parametrize(
    ("of", "by"),
    [
        ("(row.logProbs[i]), total)", "(row.logProbs[i]), 1)"),  # forgets sum y
        ("a.divide(-y, row.probs[i])", "-y"),
        ("a.subtract(u, total), row.probs[i]", "a.subtract(u, 0), row.probs[i]"),
        ("x === 0 ? 0 : ", ""),  # 0 log 0 = NaN
        ("state.smoothing / CLASSES.length", "state.smoothing"),
        ("shifted.map((z) => a.subtract(z, logTotal))", "powers.map(a.log)"),
        ('"float32", Math.fround', '"float32", (x) => Math.fround(x * (1 + 1e-6))'),
        ("add: (a, b) => round(a + b)", "add: (a, b) => round(a + b + 1e-15)"),
    ],
)
def test_planted_error_is_detected(of: str, by: str) -> None:
    source = script("numerics")
    assert source.count(of) == 1
    broken = start(source.replace(of, by))

    def check_all() -> None:
        for family, precision in itertools.product(FAMILIES, PRECISIONS):
            check_family(broken, family, precision)

    with pytest.raises(AssertionError):
        check_all()


# --- words


@pytest.fixture(scope="module")
def presets(engine: MiniRacer) -> dict[str, dict[str, dict[str, Any]]]:
    """Each preset's name -> precision -> what the page computes."""
    states = value_of(engine, "PRESETS")
    return {given["name"]: {p: evaluate(engine, [given], p)[0] for p in PRECISIONS} for given in states}


BITS = f"p {MINUS} y: equal bit for bit in float64 and in float32."
WORDS = {  # of each spelling in float64 and float32; one word where both are the same
    "The article": "reference identical identical scaled rounding breaks",
    "Certain and wrong": "reference identical identical scaled rounding/breaks breaks",
    "Almost underflowing": "reference identical identical scaled rounding/breaks breaks",
    "Certain and right": "reference identical identical rounding rounding/breaks breaks",
    "Soft label": "undefined reference offset scaled rounding breaks",
    "Smoothed": "undefined reference offset scaled rounding offset",
    "Masked class": "reference breaks breaks breaks breaks breaks",
}


def test_presets_show_their_words(presets: dict[str, dict[str, Any]]) -> None:
    assert {name: words(*presets[name].values()) for name in WORDS} == WORDS
    article, certain = presets["The article"]["FLOAT64"], presets["Model = label"]["FLOAT64"]["spellings"]
    assert article["probs"] == pytest.approx([0.1, 0.2, 0.7], rel=1e-15)
    assert article["targetProbs"] == [0, 1, 0]
    assert certain["kl"]["value"] == pytest.approx(0, abs=1e-15)
    assert certain["ce"]["gradient"] == pytest.approx([0, 0, 0], abs=1e-15)
    almost, wrong = (
        presets[name]["FLOAT32"]["spellings"]["log-of-softmax"] for name in ("Almost underflowing", "Certain and wrong")
    )
    assert almost["value"] == pytest.approx(95.31, abs=0.01)
    assert not all(map(math.isfinite, almost["gradient"]))
    assert wrong["value"] == INF
    assert all(map(math.isnan, wrong["gradient"]))


def words(wide: dict[str, Any], narrow: dict[str, Any]) -> str:
    pairs = []
    for key in TORCH:
        both = ["reference" if key == one["reference"] else one["spellings"][key]["word"] for one in (wide, narrow)]
        if key in ("kl-mean", "log-of-softmax"):  # another order of operations: equal bits are chance
            both = [word.replace("identical", "rounding") for word in both]
        pairs.append("/".join(dict.fromkeys(both)))
    return " ".join(pairs)


@pytest.mark.parametrize(
    ("name", "key", "precision", "reason"),
    [
        ("Soft label", "kl", "FLOAT32", "H(y) = 0.3251 nats: another value, the same gradient"),
        ("The article", "kl", "FLOAT32", "H(y) = 0 for a one-hot label"),
        ("The article", "kl-literal", "FLOAT32", "y = 0 at cat and other"),
        ("Certain and wrong", "log-of-softmax", "FLOAT32", "softmax is 0 at cat: log 0"),
        ("Certain and wrong", "log-of-softmax", "FLOAT64", "Right here"),
        ("Almost underflowing", "log-of-softmax", "FLOAT32", "1 / p overflows"),
        ("Certain and right", "log-of-softmax", "FLOAT32", "both 0 at dog and other"),
        ("Masked class", "ce", "FLOAT32", "masked class other has y = 0"),
        ("Masked class", "nll", "FLOAT32", "not multiplied"),
        ("Soft label", "nll", "FLOAT32", "spread over classes"),
    ],
)
def test_reasons_name_the_cause(
    presets: dict[str, dict[str, Any]], name: str, key: str, precision: str, reason: str
) -> None:
    assert reason in presets[name][precision]["spellings"][key]["why"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (state((1, 2, 3)), f"NLL, CE and KL are one, {BITS} So are their values, 2.407606 nats."),
        (state((1, 2, 3), (1, 1, 0)), f"CE and KL are one, {BITS} KL is less than CE by H(y) = 0.6931 nats"),
        (state((2, 1, -INF)), "NLL is 0.3132617 nats; the values of CE and KL are NaN"),
        (state((2, 1, -INF), (1, 1, 0)), "Their values are NaN"),
        (state((2, 1, -INF), (0, 1, 1)), "Their values are infinite."),
        (state((2, -3, -INF), (1, 1, 1)), "Their values are infinite."),
        (state((-INF, -INF, -INF)), "Nothing is defined here. Every class is masked"),
        (state((1, 2, 3), (0, 0, 0)), "Nothing is defined here. The three weights are 0"),
    ],
)  # fmt: skip
def test_headline_states_the_relation(engine: MiniRacer, given: State, sentence: str) -> None:
    assert sentence in value_of(engine, f"headline({json.dumps(given)})")


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (0.0, 7, "0"), (-0.0, 7, "0"), (0.1, 7, "0.1"), (-2.302585092994046, 7, f"{MINUS}2.302585"), (95.0, 8, "95"),
        (1.401298464324817e-45, 6, f"1.401e{MINUS}45"), (1234567.0, 4, "1.235e6"), (1e-4, 4, "0.0001"),
        (math.nan, 4, "NaN"), (INF, 4, "inf"), (-INF, 4, f"{MINUS}inf"),
    ],
)  # fmt: skip
def test_shown_number(engine: MiniRacer, x: float, digits: int, text: str) -> None:
    assert value_of(engine, f"shown({json.dumps(x)}, {digits})") == text


def test_logit_slider_reaches_150_and_is_finer_in_the_middle(engine: MiniRacer) -> None:
    places = "Array.from({ length: 2 * TRACK + 1 }, (_, i) => i - TRACK)"
    logits = value_of(engine, f"{places}.map(logitAt)")
    assert (logits[0], logits[200], logits[-1]) == (-150, 0, 150)
    assert np.diff(logits) == pytest.approx([1.4] * 100 + [0.1] * 200 + [1.4] * 100)
    assert value_of(engine, f"{places}.map((i) => positionOf(logitAt(i)))") == list(range(-200, 201))


def test_page_has_the_audits_constant(engine: MiniRacer) -> None:
    assert value_of(engine, "ALLOWED") == CONSTANT


# --- the cases


def test_embedded_cases_are_current() -> None:
    assert with_cases(PAGE_TEXT) == PAGE_TEXT, "python -m experiments.audit.cases_for_page"
    assert json.loads(embedded(PAGE_TEXT)) == cases()


def test_recorded_catalogue_is_current() -> None:
    recorded = (PAGE.parents[1] / "experiments" / "audit" / "catalogue.md").read_text("utf-8")
    assert recorded.rstrip("\n") == markdown(), "python -m experiments.audit.catalogue > experiments/audit/catalogue.md"


def test_cases_have_code_a_word_and_a_reason() -> None:
    made = cases()
    shown = [case for case in CATALOGUE if case.fn is not None]
    assert [case["row"] for case in made["cases"]] == [case.row for case in shown]
    assert len(made["cases"]) >= 30
    assert {case["word"] for case in made["cases"]} == set(made["words"])
    for case, known in zip(made["cases"], shown, strict=True):
        assert case["word"] == known.objective == recorded_rows()[known.row]["objective"]
        assert case["sentence"]
        for name, call in zip((case["candidate"], case["reference"]), case["compared"], strict=True):
            if (own := made["functions"].get(name)) is None:
                assert call.startswith(f"F.{name}(")
                continue
            assert own["says"]
            assert f"def {name}(" in own["code"]
            assert '"""' not in own["code"]
            compile(own["code"], name, "exec")


def test_word_that_differs_from_the_catalogue_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "sentences.csv"
    other.write_text(SENTENCES.read_text("utf-8").replace("1,scaled,", "1,identical,", 1), encoding="utf-8")
    monkeypatch.setattr("experiments.audit.cases_for_page.SENTENCES", other)
    with pytest.raises(ValueError, match=r"row 1: sentences\.csv says identical"):
        cases()


# --- one file


MARKUP = re.sub(r"(<(style|script)[^>]*>).*?(?=</\2>)", r"\1", PAGE_TEXT, flags=re.DOTALL)
CODE = "".join(re.findall(r"<(?:style|script(?![^>]*type=)[^>]*)>(.*?)</(?:style|script)>", PAGE_TEXT, re.DOTALL))


def test_page_fetches_nothing() -> None:
    fetching = r"<(link|img|iframe|object|embed|base)\b|\bsrc(set)?\s*="
    assert not re.search(fetching, MARKUP, re.IGNORECASE)
    assert {tag.lower() for tag in re.findall(r"<(\w+)[^>]*\bhref\s*=", MARKUP, re.IGNORECASE)} <= {"a"}
    for word in ("fetch(", "XMLHttpRequest", "import ", "import(", "@import", "url(", "WebSocket", "http:", "https:"):
        assert word not in CODE, word


def test_ids_are_unique_and_references_resolve() -> None:
    ids = re.findall(r'\bid="([^"]+)"', MARKUP)
    assert len(ids) == len(set(ids)) > 10
    references = re.findall(r'byId\("([^"]+)"\)', CODE) + re.findall(r'aria-labelledby="([^"]+)"', MARKUP)
    assert len(references) > 10
    assert {*references, *(f"bars-{name.lower()}" for name in PRECISIONS)} <= set(ids)


def test_numerics_use_no_document() -> None:
    source = script("numerics").replace("the document", "")
    assert not re.search(r"\b(document|window|localStorage|navigator)\b", source)


def test_page_without_its_cases_stays_small() -> None:
    assert len(PAGE_TEXT.replace(embedded(PAGE_TEXT), "").encode()) < 60_000
