"""docs/identity.html: its numerics against torch in a JavaScript engine, its embedded cases, and that it is one file.

Bounds are in the audit's unit, u (1 + M + sqrt(C)), M the largest finite |z| or |log p| (audit/rounding.py). To first
order log p = (z - max) - log sum exp(z - max) may be off by u (2 |log p| + 8): two subtractions, the rounding of the
argument of exp (sum_j p_j |z_j - max| < 1), exp and log with an error of one ulp, two additions. As M >= log 3, that is
2.7 units at most; a value adds products and sums of three terms, 3 units at most; a gradient has p times the error of
log p and four roundings, less than 3. The page and torch may be off in opposite directions: 12 units bound the
difference, the number that the audit allows. What is seen is below 2; 4 is what is asked for here.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from html.parser import HTMLParser
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
from likelihood_lab.categorical.losses import literal_kl_divergence, nll_of_log_of_softmax
from tests.laboratory import CPU, shipped

UNITS = 4.0
PRECISIONS = {"FLOAT64": torch.float64, "FLOAT32": torch.float32}
INF = math.inf
MINUS = "\N{MINUS SIGN}"
State = dict[str, Any]
Objective = Callable[[Tensor, Tensor], Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # KL's default reduction


# --- the page's script in an engine


def script(name: str) -> str:
    (text,) = re.findall(rf'<script id="{name}">\n(.*?)</script>', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(text)


@pytest.fixture(scope="module")
def engine() -> MiniRacer:
    """The numerics alone: nothing of a document is there."""
    made = MiniRacer()
    made.eval(script("numerics"))
    return made


def asked(engine: MiniRacer, expression: str) -> Any:
    """The value of an expression; JSON has no NaN and no infinity, so that those travel as words."""
    words = "(key, x) => typeof x === 'number' && !Number.isFinite(x) ? `#${x}` : x"
    return _numbers(json.loads(str(engine.eval(f"JSON.stringify({expression}, {words})"))))


def _numbers(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _numbers(item) for key, item in x.items()}
    if isinstance(x, list):
        return [_numbers(item) for item in x]
    return float(x[1:].replace("Infinity", "inf")) if isinstance(x, str) and x.startswith("#") else x


def as_script(x: Any) -> str:
    return json.dumps(x)  # writes NaN and Infinity as JavaScript does


def evaluated(engine: MiniRacer, states: Iterable[State], precision: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = asked(engine, f"{as_script(list(states))}.map((s) => evaluate(s, {precision}))")
    return found


# --- states


def state(logits: Any, weights: Any = (1, 0, 0), smoothing: float = 0.0) -> State:
    return {"logits": [float(z) for z in logits], "weights": [float(w) for w in weights], "smoothing": smoothing}


def _families() -> dict[str, list[State]]:
    """Seeded states of every kind that the controls can reach; ties, saturation, and shifts are put there by hand."""
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


# --- the same by torch


def targets(given: State, dtype: torch.dtype) -> Tensor:
    """[1, C]; torch smooths probabilities by this very expression."""
    weights = torch.tensor([given["weights"]], dtype=torch.float64).to(dtype)
    target_probs = weights / weights.sum(1, keepdim=True)
    if not given["smoothing"]:
        return target_probs
    smoothing: float = given["smoothing"]
    return target_probs * (1 - smoothing) + smoothing / 3


def declared(name: str) -> Objective:
    """A formulation of `conf/loss/`, as a function of logits and target probabilities."""
    (formulation,) = shipped(name)

    def objective(logits: Tensor, target_probs: Tensor) -> Tensor:
        inputs = derive(formulation.args, logits) | {"target_probs": target_probs, "labels": target_probs.argmax(1)}
        return formulation.objective(formulation.instance(CPU, logits.dtype), [inputs[arg] for arg in formulation.args])

    return objective


def log_of_softmax(logits: Tensor, target_probs: Tensor) -> Tensor:
    value: Tensor = -(target_probs * logits.softmax(1).log()).sum(1).mean()
    return value


TORCH: dict[str, Objective] = {
    "nll": declared("nll"),
    "ce": declared("ce_one_hot"),
    "kl": declared("kl"),
    "kl-mean": declared("kl_mean"),
    "log-of-softmax": log_of_softmax,
    "kl-literal": lambda logits, target_probs: literal_kl_divergence(logits.softmax(1), target_probs),
}


def by_torch(given: State, objective: Objective, dtype: torch.dtype) -> tuple[float, list[float]]:
    logits = torch.tensor([given["logits"]], dtype=torch.float64).to(dtype).requires_grad_()
    value = objective(logits, targets(given, dtype))
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient[0].tolist()


@cache
def all_by_torch(family: str, precision: str) -> list[dict[str, tuple[float, list[float]]]]:
    dtype = PRECISIONS[precision]
    return [{key: by_torch(given, fn, dtype) for key, fn in TORCH.items()} for given in FAMILIES[family]]


def unit(given: State, dtype: torch.dtype) -> float:
    """The audit's own unit of the row."""
    logits = torch.tensor([given["logits"]], dtype=torch.float64).to(dtype).double()
    labels = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    rows = rows_of(logits, labels, torch.tensor([True]), None)
    return float(unit_roundoff(dtype) * rows.reach)


def smallest_labelled_log_prob(given: State) -> float:
    """The smallest finite log p of a class with y > 0; what a logarithm of a rounded probability is taken of."""
    log_probs = torch.tensor([given["logits"]], dtype=torch.float64).log_softmax(1)[0]
    labelled = log_probs[targets(given, torch.float64)[0] > 0]
    return min([x for x in labelled.tolist() if math.isfinite(x)], default=0.0)


def lost_bits(given: State, dtype: torch.dtype) -> float:
    """What a subnormal p costs log p: two implementations of exp, each off by one step of 2^-149, over p."""
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return 2 * step * math.exp(min(700.0, -smallest_labelled_log_prob(given)))


def difference(x: float, y: float) -> float:
    """|x - y|; 0 for two NaN and for two equal infinities, infinite where only one is not finite."""
    if math.isnan(x) or math.isnan(y):
        return 0.0 if math.isnan(x) and math.isnan(y) else INF
    return 0.0 if x == y else abs(x - y)


def test_a_difference_is_infinite_where_one_side_alone_is_not_finite() -> None:
    assert difference(math.nan, math.nan) == difference(INF, INF) == difference(0.0, -0.0) == 0
    assert difference(math.nan, 1) == difference(1, INF) == difference(INF, -INF) == difference(math.nan, INF) == INF


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_and_gradient_is_torchs(engine: MiniRacer, family: str, precision: str) -> None:
    states, dtype = FAMILIES[family], PRECISIONS[precision]
    expected = all_by_torch(family, precision)
    for given, found, known in zip(states, evaluated(engine, states, precision), expected, strict=True):
        allowed = UNITS * unit(given, dtype)
        for key, (value, gradient) in known.items():
            page, where = found["spellings"][key], f"{key} of {given}: {found['spellings'][key]}"
            if key == "nll" and set(found["targetProbs"]) != {0, 1}:
                assert page["word"] == "undefined"
                assert page.keys() == {"word", "why"}
                continue
            bits = lost_bits(given, dtype) if key in ("log-of-softmax", "kl-literal") else 0.0
            assert difference(page["value"], value) <= allowed + bits, (where, value)
            assert max(map(difference, page["gradient"], gradient)) <= allowed, (where, gradient)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_they_are_made_of_is_torchs(engine: MiniRacer, family: str, precision: str) -> None:
    states, dtype = FAMILIES[family], PRECISIONS[precision]
    tiny = 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # two steps among subnormal numbers
    for given, found in zip(states, evaluated(engine, states, precision), strict=True):
        logits = torch.tensor([given["logits"]], dtype=torch.float64).to(dtype)
        target_probs, allowed = targets(given, dtype), UNITS * unit(given, dtype)
        assert found["logits"] == logits[0].tolist()
        assert found["targetProbs"] == pytest.approx(
            target_probs[0].tolist(), abs=2 * unit_roundoff(dtype), nan_ok=True
        )
        probs = logits.softmax(1)[0].tolist()
        for p, expected in zip(found["probs"], probs, strict=True):
            assert difference(p, expected) <= allowed * expected + tiny or math.isnan(expected)
        assert max(map(difference, found["logProbs"], logits.log_softmax(1)[0].tolist())) <= allowed
        direction = (logits.softmax(1) - target_probs)[0].tolist()
        assert max(map(difference, found["direction"], direction)) <= allowed
        entropy = torch.special.entr(target_probs).sum().item()
        assert difference(found["entropy"], entropy) <= 4 * unit_roundoff(dtype)
        if any(map(math.isfinite, given["logits"])):
            assert found["unit"] == pytest.approx(unit(given, dtype), rel=1e-6)


def test_smoothing_is_that_of_torchs_cross_entropy(engine: MiniRacer) -> None:
    states = FAMILIES["smoothed"]
    for given, found in zip(states, evaluated(engine, states, "FLOAT64"), strict=True):
        logits = torch.tensor([given["logits"]], dtype=torch.float64)
        bare = targets(given | {"smoothing": 0.0}, torch.float64)
        expected = F.cross_entropy(logits, bare, label_smoothing=given["smoothing"]).item()
        assert difference(found["spellings"]["ce"]["value"], expected) <= UNITS * unit(given, torch.float64)


def test_log_of_softmax_has_the_value_of_the_formulation_that_reads_off_the_label(engine: MiniRacer) -> None:
    states = FAMILIES["one-hot"]
    for given, found in zip(states, evaluated(engine, states, "FLOAT32"), strict=True):
        probs = torch.tensor([given["logits"]], dtype=torch.float64).float().softmax(1)
        expected = nll_of_log_of_softmax(probs, torch.tensor(given["weights"]).argmax()[None]).item()
        assert difference(found["spellings"]["log-of-softmax"]["value"], expected) <= UNITS * unit(given, torch.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_three_gradients_are_equal_bit_for_bit_and_kl_is_off_by_the_entropy(
    engine: MiniRacer, precision: str
) -> None:
    states = [given for name, family in FAMILIES.items() if name not in ("masked", "no label") for given in family]
    for found in evaluated(engine, states, precision):
        nll, ce, kl = (found["spellings"][key] for key in ("nll", "ce", "kl"))
        assert ce["gradient"] == kl["gradient"]
        assert nll.get("gradient", ce["gradient"]) == ce["gradient"]
        assert abs(kl["value"] - ce["value"] + found["entropy"]) <= UNITS * found["unit"]


def test_the_states_reach_every_way_to_break() -> None:
    """Else the tests above could agree about nothing but ordinary numbers."""
    seen = set()
    for known in itertools.chain.from_iterable(all_by_torch(family, "FLOAT32") for family in FAMILIES):
        for key, (value, gradient) in known.items():
            seen.add((key, "value", str(value) if not math.isfinite(value) else "finite"))
            seen |= {(key, "gradient", str(g) if not math.isfinite(g) else "finite") for g in gradient}
    for key in TORCH:
        assert {(key, "value", kind) for kind in ("finite", "inf", "nan")} <= seen
        assert {(key, "gradient", kind) for kind in ("finite", "nan")} <= seen
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
def test_a_planted_error_is_found(of: str, by: str) -> None:
    source = script("numerics")
    assert source.count(of) == 1
    broken = MiniRacer()
    broken.eval(source.replace(of, by))

    def both_tests() -> None:
        for family, precision in itertools.product(FAMILIES, PRECISIONS):
            test_every_value_and_gradient_is_torchs(broken, family, precision)
            test_what_they_are_made_of_is_torchs(broken, family, precision)

    with pytest.raises(AssertionError):
        both_tests()


# --- words


def presets(engine: MiniRacer) -> dict[str, State]:
    return {preset["name"]: preset for preset in asked(engine, "PRESETS")}


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


def test_the_presets_show_what_they_say(engine: MiniRacer) -> None:
    found = {name: [evaluated(engine, [given], p)[0] for p in PRECISIONS] for name, given in presets(engine).items()}
    assert {name: words(*both) for name, both in found.items() if name in WORDS} == WORDS
    wide, _ = found["The article"]
    assert wide["probs"] == pytest.approx([0.1, 0.2, 0.7], rel=1e-15)
    assert wide["targetProbs"] == [0, 1, 0]
    wide, _ = found["Model = label"]
    assert wide["spellings"]["kl"]["value"] == pytest.approx(0, abs=1e-15)
    assert wide["spellings"]["ce"]["gradient"] == pytest.approx([0, 0, 0], abs=1e-15)
    _, narrow = found["Almost underflowing"]
    assert narrow["spellings"]["log-of-softmax"]["value"] == pytest.approx(95.31, abs=0.01)
    assert not all(map(math.isfinite, narrow["spellings"]["log-of-softmax"]["gradient"]))
    _, narrow = found["Certain and wrong"]
    assert narrow["spellings"]["log-of-softmax"]["value"] == INF
    assert all(map(math.isnan, narrow["spellings"]["log-of-softmax"]["gradient"]))


def words(wide: dict[str, Any], narrow: dict[str, Any]) -> str:
    pairs = []
    for key in TORCH:
        both = ["reference" if key == one["reference"] else one["spellings"][key]["word"] for one in (wide, narrow)]
        if key in ("kl-mean", "log-of-softmax"):  # another order of operations: equal bits are chance
            both = [word.replace("identical", "rounding") for word in both]
        pairs.append("/".join(dict.fromkeys(both)))
    return " ".join(pairs)


def test_the_reasons_name_what_happens(engine: MiniRacer) -> None:
    def why(name: str, key: str, precision: str = "FLOAT32") -> str:
        (found,) = evaluated(engine, [presets(engine)[name]], precision)
        return str(found["spellings"][key]["why"])

    assert "H(y) = 0.3251 nats: another value, the same gradient" in why("Soft label", "kl")
    assert "H(y) = 0 for a one-hot label" in why("The article", "kl")
    assert "y = 0 at cat and other" in why("The article", "kl-literal")
    assert "softmax is 0 at cat: log 0" in why("Certain and wrong", "log-of-softmax")
    assert "Right here" in why("Certain and wrong", "log-of-softmax", "FLOAT64")
    assert "1 / p overflows" in why("Almost underflowing", "log-of-softmax")
    assert "both 0 at dog and other" in why("Certain and right", "log-of-softmax")
    assert "masked class other has y = 0" in why("Masked class", "ce")
    assert "not multiplied" in why("Masked class", "nll")
    assert "spread over classes" in why("Soft label", "nll")


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
def test_the_headline_says_what_holds(engine: MiniRacer, given: State, sentence: str) -> None:
    assert sentence in asked(engine, f"headline({as_script(given)})")


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (0.0, 7, "0"), (-0.0, 7, "0"), (0.1, 7, "0.1"), (-2.302585092994046, 7, f"{MINUS}2.302585"), (95.0, 8, "95"),
        (1.401298464324817e-45, 6, f"1.401e{MINUS}45"), (1234567.0, 4, "1.235e6"), (1e-4, 4, "0.0001"),
        (math.nan, 4, "NaN"), (INF, 4, "inf"), (-INF, 4, f"{MINUS}inf"),
    ],
)  # fmt: skip
def test_numbers_are_written_plainly(engine: MiniRacer, x: float, digits: int, text: str) -> None:
    assert asked(engine, f"shown({as_script(x)}, {digits})") == text


def test_a_logits_slider_reaches_150_and_is_finer_in_the_middle(engine: MiniRacer) -> None:
    logits = asked(engine, "Array.from({ length: 2 * TRACK + 1 }, (_, i) => logitAt(i - TRACK))")
    assert (logits[0], logits[200], logits[-1]) == (-150, 0, 150)
    steps = np.diff(logits)
    assert steps[100:300] == pytest.approx(0.1)
    assert steps[:100] == pytest.approx(1.4)
    assert steps[300:] == pytest.approx(1.4)
    back = asked(engine, "Array.from({ length: 2 * TRACK + 1 }, (_, i) => positionOf(logitAt(i - TRACK)))")
    assert back == list(range(-200, 201))


def test_the_audits_constant_is_the_pages(engine: MiniRacer) -> None:
    assert asked(engine, "ALLOWED") == CONSTANT


# --- the cases


def test_the_embedded_cases_are_those_of_today() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_cases(page) == page, "python -m experiments.audit.cases_for_page"
    assert json.loads(embedded(page)) == cases()


def test_the_recorded_catalogue_is_that_of_today() -> None:
    recorded = (PAGE.parents[1] / "experiments" / "audit" / "catalogue.md").read_text(encoding="utf-8")
    assert recorded.rstrip("\n") == markdown(), "python -m experiments.audit.catalogue > experiments/audit/catalogue.md"


def test_every_case_can_be_read_and_has_a_word_and_a_reason() -> None:
    made = cases()
    asked_of_the_audit = [case for case in CATALOGUE if case.fn is not None]
    assert [case["row"] for case in made["cases"]] == [case.row for case in asked_of_the_audit]
    assert len(made["cases"]) >= 30
    assert {case["word"] for case in made["cases"]} == set(made["words"])
    for case, known in zip(made["cases"], asked_of_the_audit, strict=True):
        assert case["word"] == known.objective == recorded_rows()[known.row]["objective"]
        assert case["sentence"]
        for name, call in zip((case["candidate"], case["reference"]), case["compared"], strict=True):
            own = made["functions"].get(name)
            assert own is not None or call.startswith(f"F.{name}(")
            if own is not None:
                assert own["says"]
                assert f"def {name}(" in own["code"]
                assert '"""' not in own["code"]
                compile(own["code"], name, "exec")


def test_a_word_that_the_catalogue_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    other = tmp_path / "sentences.csv"
    other.write_text(SENTENCES.read_text(encoding="utf-8").replace("1,scaled,", "1,identical,", 1), encoding="utf-8")
    monkeypatch.setattr("experiments.audit.cases_for_page.SENTENCES", other)
    with pytest.raises(ValueError, match=r"row 1: sentences\.csv says identical"):
        cases()


# --- one file


class Reader(HTMLParser):
    """Tags with their attributes, and the text of styles and scripts that run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.code = ""
        self._runs = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._runs = tag == "style" or (tag == "script" and dict(attrs).get("type") is None)

    def handle_endtag(self, tag: str) -> None:
        self._runs = False

    def handle_data(self, data: str) -> None:
        self.code += data if self._runs else ""


@pytest.fixture(scope="module")
def page() -> Reader:
    reader = Reader()
    reader.feed(PAGE.read_text(encoding="utf-8"))
    return reader


def test_the_page_fetches_nothing(page: Reader) -> None:
    for tag, attrs in page.tags:
        assert "src" not in attrs, tag
        assert "srcset" not in attrs, tag
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert tag == "a" or "href" not in attrs
    for word in ("fetch(", "XMLHttpRequest", "import ", "import(", "@import", "url(", "WebSocket", "http:", "https:"):
        assert word not in page.code, word


def test_ids_are_unique_and_what_refers_to_them_finds_them(page: Reader) -> None:
    ids = [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'byId\("([^"]+)"\)', page.code)) | {f"bars-{name.lower()}" for name in PRECISIONS}
    wanted |= {str(attrs["aria-labelledby"]) for _, attrs in page.tags if "aria-labelledby" in attrs}
    assert wanted <= set(ids)


def test_the_numerics_know_no_document() -> None:
    assert not re.search(
        r"\b(document|window|localStorage|navigator)\b", script("numerics").replace("the document", "")
    )


def test_what_is_written_by_hand_stays_small() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.replace(embedded(text), "").encode()) < 60_000
