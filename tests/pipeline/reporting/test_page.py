"""The report: one self-contained page that shows every result and every failure, and escapes all text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.reporting.figures import write_report
from pipeline.reporting.page import ReportData, headline, page
from pipeline.reporting.sensitivity import smallest_detectable, what_was_detected
from pipeline.text import prose
from pipeline.verdict.audit_entry import Audit
from pipeline.verdict.results import Comparison, Verdict

MARGINS = {"nll": 0.02, "accuracy": 0.01, "brier": 0.005}
NLL_ALONE = {"nll": 0.02}
COMMAND = "python -m pipeline.train 'loss=[nll,ce,kl]' 'seed=range(3)'"
STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report: one loss that equals the reference in every bit, one that does not."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, report_data(*results(["nll", "brier"], margins=MARGINS)))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def equals(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Every loss equals the reference in every bit."""
    return report(tmp_path_factory.mktemp("equals"), *results(["nll", "kl"]))


def test_page_is_self_contained_and_well_formed(whole: Page) -> None:
    loading = {"src", "srcset", "data", "href", "xlink:href", "action", "poster"}
    loads = [value for _, attributes in whole.tags for name, value in attributes.items() if name in loading]
    assert loads  # markers are drawn by reference
    assert all(value.startswith("#") for value in loads)
    assert "script" not in whole.counts
    assert not re.search(r"@import|url\((?!#)", whole.text)
    ids = Counter(attributes["id"] for _, attributes in whole.tags if "id" in attributes)
    assert whole.open == []
    assert [name for name, count in ids.items() if count > 1] == []
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', whole.text)) <= ids.keys()
    order = ["What is the smallest detectable difference?", "Which differences were detected?", "Verdict"]
    places = [whole.words.index(heading) for heading in order]
    assert places == sorted(places)


def test_every_picture_is_a_file_with_an_alternative_text(whole: Page, folder: Path) -> None:
    pictures = [attributes for tag, attributes in whole.tags if tag == "svg"]
    files = sorted(path.stem for path in (folder / "figures").iterdir())
    forests = ["difference-accuracy", "difference-brier", "difference-nll"]
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 40 for picture in pictures)
    assert files == ["curve-accuracy", "curve-nll", *forests, "distance", "margin-nll"]
    assert len(pictures) == len(files)


def test_report_is_deterministic_and_replaces_an_earlier_one(whole: Page, tmp_path: Path) -> None:
    assert report(tmp_path, *results(["nll", "brier"], margins=MARGINS)).text == whole.text
    assert not re.search(r"\b20\d\d-\d\d-\d\d", whole.text)
    report(tmp_path, *results([]))
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["curve-nll.svg", "report.html"]  # nothing of the comparisons is left


def test_names_are_escaped_and_drawn_whatever_they_are(tmp_path: Path) -> None:
    losses = ["<b>&$x_$", "交叉熵", "a_very_long_name_" * 8, "_private"]
    seen = report(tmp_path, *results(losses), command="echo '</pre><script>'")
    assert "<b>" not in seen.text
    assert not {"b", "script"} & seen.counts.keys()
    assert seen.words.count("<b>&$x_$") >= 8  # headline, tables, and the labels in each picture
    assert "echo '</pre><script>'" in seen.words
    pictures = seen.words.split("Learning curves")[1]
    assert all(name in pictures for name in ("交叉熵", "a_very_long_name_a_very…", "_private"))


# ---------------------------------------------------------------- equal and failed runs


def test_equal_curves_and_distances_of_zero_are_noted(equals: Page, whole: Page, tmp_path: Path) -> None:
    assert "Equal in every value, one line: ce, nll and kl." in equals.words
    assert "ce = nll = kl" in equals.words
    assert equals.words.count("all 3 exactly 0") >= 2
    assert "Distance 0 (bitwise equal) at all recorded steps of all seeds: kl and nll." in equals.words
    assert "0 (bitwise equal)" in equals.words
    assert "0 (bitwise equal)" in whole.words
    verdict, history, _ = results(["nll"])  # curves that differ in the last bit are not equal
    history = history[history["metric"] == "val/nll"]
    history.loc[history.index[-1], "value"] = np.nextafter(history["value"].iloc[-1], 9.0)
    assert "one line" not in report(tmp_path, verdict, history).words


def test_failed_pairs_and_ended_curves_are_noted(tmp_path: Path) -> None:
    """A positive distance has no floor for 0."""
    verdict, history, differences = results(["brier"])
    differences.loc[differences["seed"] > 0, "difference"] = np.nan
    history.loc[(history["loss"] == "ce") & (history["seed"] == 2) & (history["step"] >= 20), "value"] = np.nan
    words = report(tmp_path, verdict, history, differences).words
    assert "2 failed, 1 differ" in words
    assert "Cross: a seed stops being finite (ce)." in words
    assert "bitwise equal)" not in words


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_failures_are_listed_recorded_or_not(broken: float) -> None:
    verdict, history, _ = results(["brier"], seeds=4)
    causes = [{"seed": seed, "step": 17, "cause": "the objective is not finite"} for seed in (1, 2)]
    verdict["comparisons"][0]["failures"] = causes
    rows = (history["loss"] == "ce") & (history["seed"] == 2) & (history["step"] >= 20)
    history.loc[rows & (history["metric"] == "val/nll"), "value"] = broken
    words = words_of(verdict, history[(history["loss"] != "brier") | (history["seed"] != 3)])
    assert "brier 1, 2 17 the objective is not finite" in words
    assert "ce 2 20 val/nll is not finite" in words
    assert "brier 3 — no recorded result" in words


def test_loss_that_is_never_finite_is_named(tmp_path: Path) -> None:
    verdict, history, differences = results(["kl_literal"])
    history.loc[history["loss"] == "kl_literal", "value"] = np.nan
    differences["difference"] = np.nan
    data = report_data(verdict, history, differences)
    data.distances["value"] = np.nan
    seen = written(tmp_path, data)
    assert seen.words.count("Not drawn, because never finite: kl_literal.") >= 2
    assert "3 failed" in seen.words


# ---------------------------------------------------------------- what may be missing


def test_single_run_is_not_compared(tmp_path: Path) -> None:
    verdict, history, _ = results([], seeds=1)
    words = report(tmp_path, verdict, history).words
    assert "ce trained alone (mlp on digits, 1 seed): nothing was compared." in words
    assert "One seed." in words
    assert "Test set, after the last step" in words
    assert "Estimand" not in words
    assert "Failed runs" not in words


def test_metric_without_a_margin_does_not_decide(tmp_path: Path) -> None:
    verdict, history, differences = results(["brier", "nll"])
    verdict["protocol"]["margins"] = None
    words = report(tmp_path, verdict, history, differences).words
    assert "Without a margin it does not decide equivalence." in words
    assert "units of the margin" not in words


def test_verdict_of_nulls_asserts_nothing() -> None:
    verdict, history, _ = results(["brier"])
    verdict["comparisons"] = [dict.fromkeys(f.name for f in fields(Comparison)) | {"loss": "brier"}]
    verdict |= dict.fromkeys(("environment", "protocol", "optimizer", "precision", "sweep"))
    words = words_of(verdict, history)
    assert "brier is not compared with ce" in words
    assert "None" not in words


@pytest.mark.parametrize(("confirmed", "word"), [(True, "holds"), (False, "refuted"), (None, "undecided")])
def test_expectation_is_shown_with_its_result(confirmed: bool | None, word: str) -> None:
    verdict, history, _ = results(["brier"])
    verdict["comparisons"][0] |= {"expected": "same", "confirmed": confirmed}
    assert f"same: {word}" in words_of(verdict, history)


def test_headline_groups_losses_by_verdict_sameness_first() -> None:
    verdict, history, _ = results(["brier", "nll", "kl"])
    assert headline(Verdict.from_json(verdict), history) == (
        "nll and kl are identical to ce; brier is different from ce (mlp on digits, 3 paired seeds)."
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (True, "yes"),
        (0, "0"),
        (-0.00012345, "\N{MINUS SIGN}0.0001234"),
        ([0, 1], "0, 1"),
        (["a", "b"], "a; b"),
        ([], "none"),
        ({"axis": "gap", "limit": 103.0}, "axis: gap; limit: 103"),
    ],
)
def test_prose_of_json_values(value: Any, text: str) -> None:
    assert prose(value) == text


def test_report_of_many_runs_stays_small(tmp_path: Path) -> None:
    """Curves of many points are thinned: six losses of thirty seeds stay below 0.5 MB."""
    losses = [f"loss_{i}" for i in range(5)]
    seen = report(tmp_path, *results(losses, seeds=30, steps=range(10, 2010, 10), margins=MARGINS))
    assert len(seen.text.encode()) < 500_000
    assert seen.counts["svg"] == 7


# ---------------------------------------------------------------- controls and detection limits

CONTROLS = {"placebo_float64": 0.01, "dose": 2.0}  # margins by which they move nll
SIZES = {
    "label smoothing": {"float32": 3e-6, "float64": 1e-14, "float32 inside float64": 1e-7},
    "epsilon in the log": {"float32": None, "float64": None},
}
AUDIT = {"reference": "ce", "losses": {"brier": {"objective": "different", "would_have_caught": SIZES}}}


def with_controls(
    dose: str = "different", placebo: str = "equivalent", moves: float = 2.0, **changes: Any
) -> ReportData:
    """Results of one loss, a placebo and a dose; `changes` of the loss's entry in the verdict."""
    verdict, history, differences = results(["brier"])
    verdict["comparisons"][0] |= changes
    sizes = CONTROLS | {"dose": moves}
    added = [(name, "nll", seed, True, size * 0.02) for name, size in sizes.items() for seed in range(3)]
    distances = [(name, seed, step, True, 1e-8 * step) for name in sizes for seed in range(3) for step in (1, 3, 10)]
    verdict["controls"] = {
        "replay": {"seed": 0, "bitwise": True},
        "outcomes": {"placebo_float64": placebo, "dose": dose},
        "metrics": {
            name: {"nll": {"margin": 0.02, "n": 3, "mean_difference": size * 0.02, "ci_tost": [0.0, size * 0.02]}}
            for name, size in sizes.items()
        },
    }
    data = report_data(verdict, history, differences)
    return replace(
        data,
        differences=pd.concat([differences, pd.DataFrame(added, columns=differences.columns)]),
        distances=pd.concat([data.distances, pd.DataFrame(distances, columns=data.distances.columns)]),
    )


def detectable(data: ReportData, audit: Mapping[str, Any] | None = AUDIT) -> list[str]:
    return smallest_detectable(data.verdict, audit and Audit.from_json(audit))


def detected(data: ReportData, audit: Mapping[str, Any] | None = AUDIT) -> list[str]:
    return what_was_detected(data.verdict, audit and Audit.from_json(audit))


def test_controls_and_gradients_are_drawn_where_they_are_known(tmp_path: Path) -> None:
    data = with_controls()
    seen = written(tmp_path, replace(data, audit=Audit.from_json(AUDIT)))
    assert "Below the line: controls that the trial added." in seen.words
    assert "Hatched: the placebos" in seen.words
    for name in ("difference-nll", "margin-nll"):
        picture = (tmp_path / "figures" / f"{name}.svg").read_text()
        places = [picture.index(f">{arm}<") for arm in ("brier", "placebo_float64", "dose")]
        assert places == sorted(places)
    assert "placebo_float64: 0.0002; dose: 0.04" in seen.text
    assert {"audit_strip.svg", "p_minus_y.svg"} <= {file.name for file in (tmp_path / "figures").iterdir()}
    assert "The losses themselves" in seen.words
    write_report(tmp_path, data)
    assert not (tmp_path / "figures" / "audit_strip.svg").exists()


def test_smallest_detectable_of_losses_first_steps_and_training() -> None:
    losses, steps, own, placebos = detectable(with_controls(envelope={"smallest": 1e-5}, outcome="equivalent"))
    assert losses == "Losses: label smoothing by 3e-06 in float32 and 1e-14 in float64."
    assert steps == "First steps of training: label smoothing by 1e-05 (as recorded on digits with an MLP)."
    assert own.startswith("Trained model of brier: a difference beyond nll 0.")
    assert placebos.startswith("Smallest margin that the placebos pass")
    assert placebos.endswith("nll 0.0002 (declared: 0.02).")
    assert not any("placebos" in line for line in detectable(with_controls(placebo="inconclusive")))


def test_smallest_detectable_is_the_largest_over_audited_losses() -> None:
    data = report_data(*results(["brier", "nll"]))
    coarser = {"objective": "rounding", "would_have_caught": {"label smoothing": {"float32": 1e-3, "float64": None}}}
    both = {"reference": "ce", "losses": {**AUDIT["losses"], "nll": coarser}}  # type: ignore[dict-item]
    assert detectable(data, both)[0] == "Losses: label smoothing by 1e-03 in float32."
    entry = {"objective": "error", "would_have_caught": {"a": {"float32": 1}}}
    failed = {"reference": "ce", "losses": {"brier": entry}}
    assert "not audited" in detectable(data, failed)[0]
    assert not any("planted" in line for line in detected(data, failed))


def test_smallest_detectable_without_controls_is_each_loss_s_own() -> None:
    verdict, *tables = results(["brier", "nll", "reverse_kl"])
    verdict["comparisons"][0]["outcome"] = "inconclusive"  # the last is different: nothing hides there
    unknown, equal, brier = detectable(report_data(verdict, *tables), None)
    assert "not audited" in unknown
    assert equal == "Trained models: one bit of any weight in any pair (nll)."
    assert brier.startswith("Trained model of brier: a difference beyond nll 0.")


@pytest.mark.parametrize(
    ("dose", "moves", "start", "end"),
    [
        ("different", 2.0, "detected", "by 2 margins, was called different."),
        ("inconclusive", 2.0, "not detected", "These seeds cannot detect a difference of that size."),
        ("equivalent", 2.0, "not detected", "These seeds cannot detect a difference of that size."),
        ("equivalent", 0.4, "not detected", "It is too small for this setting; choose another dataset.dose."),
    ],
)
def test_what_was_detected_of_all_kinds(dose: str, moves: float, start: str, end: str) -> None:
    control, placebos, losses, faults, replay = detected(with_controls(dose, moves=moves))
    assert control.startswith(f"Positive control: {start}. The reference with scaled logits, which moves nll by")
    assert control.endswith(end)
    assert placebos.endswith("called equivalent, as they should be.")
    assert losses == "Losses: brier."
    assert "1 of 2 kinds detected" in faults
    assert replay == "Replay: the reference, trained again in another slot, has the same bits."


@pytest.mark.parametrize(
    ("placebo", "reason"),
    [("inconclusive", "There are too few seeds to show them equivalent."), ("different", "Rounding alone makes a")],
)
def test_placebos_that_are_not_equivalent_have_a_reason(placebo: str, reason: str) -> None:
    assert f"called {placebo}. {reason}" in detected(with_controls(placebo=placebo))[1]


def test_nothing_planted_and_nothing_detected_is_said() -> None:
    verdict, *tables = results(["nll"])
    verdict["controls"] = {"replay": {"seed": 0, "bitwise": False}}
    nothing, replay = detected(report_data(verdict, *tables), None)
    assert nothing.startswith("Nothing: no difference was planted")
    assert "not deterministic" in replay


# ---------------------------------------------------------------- made-up results

Made = tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]


def results(
    losses: Sequence[str], seeds: int = 3, steps: Sequence[int] = STEPS, margins: Mapping[str, float] = NLL_ALONE
) -> Made:
    """`nll` and `kl` equal the reference `ce` in every bit; every other loss is its own."""
    runs = [run(loss, seed, np.array(steps), margins) for loss in ["ce", *losses] for seed in range(seeds)]
    pairs = [(loss, name, seed) for loss in losses for name in margins for seed in range(seeds)]
    rows = [(loss, name, seed, False, offset(loss) * margins[name] * (5 + seed)) for loss, name, seed in pairs]
    verdict = {
        **{"reference": "ce", "dataset": "digits", "model": "mlp", "seeds": list(range(seeds))},
        "environment": {"torch": "2.14.1", "device": "cpu"},
        "protocol": {"margins": dict(margins), "primary": ["nll"]},
        "comparisons": [comparison(loss, margins) for loss in losses],
    }
    differences = pd.DataFrame(rows, columns=["loss", "metric", "seed", "control", "difference"])
    return verdict, pd.concat(runs, ignore_index=True), differences


def offset(loss: str) -> float:
    return 0.0 if loss in {"ce", "nll", "kl"} else 1.0 + sum(map(ord, loss)) % 97 / 97


def run(loss: str, seed: int, step: np.ndarray, metrics: Collection[str]) -> pd.DataFrame:
    nll = 2.0 * np.exp(-3 * step / step[-1]) + 0.01 * seed + 0.3 * offset(loss)
    values = {"nll": nll, "accuracy": np.exp(-nll), "brier": nll / 3}
    rows = [(f"val/{name}", t, v) for name in metrics for t, v in zip(step, values[name], strict=True)]
    rows += [(f"test/{name}", step[-1], values[name][-1]) for name in metrics]
    return pd.DataFrame(rows, columns=["metric", "step", "value"]).assign(loss=loss, seed=seed)


def comparison(loss: str, margins: Mapping[str, float]) -> dict[str, Any]:
    far = offset(loss)
    word = "different" if far else "identical"
    metrics = {
        name: {"n": 3, "margin": margin, "mean_difference": 6 * far * margin}
        | ({"ci_tost": [4 * far * margin, 8 * far * margin]} if far else {})
        for name, margin in margins.items()
    }
    return {"loss": loss, "outcome": word, "verdict": word, "sentence": f"{word}.", "metrics": metrics}


def report(folder: Path, *tables: Any, command: str = COMMAND) -> Page:
    return written(folder, report_data(*tables, command=command))


def written(folder: Path, data: ReportData) -> Page:
    return Page(write_report(folder, data).read_text(encoding="utf-8"))


def report_data(
    verdict: dict[str, Any], history: pd.DataFrame, differences: pd.DataFrame | None = None, command: str = COMMAND
) -> ReportData:
    """Input of a report; the distance of the weights grows with each loss's `offset`."""
    losses = [loss for loss in history["loss"].unique() if loss != verdict["reference"]]
    steps = (1, 3, 10)
    rows = [(a, s, step, False, offset(a) * 1e-8 * step) for a in losses for s in verdict["seeds"] for step in steps]
    return ReportData(
        verdict=Verdict.from_json(verdict),
        history=history,
        differences=pd.DataFrame() if differences is None else differences,
        distances=pd.DataFrame(rows, columns=["loss", "seed", "step", "control", "value"]),
        between_seeds=pd.DataFrame([(step, 0.5 + step / 100) for step in steps], columns=["step", "value"]),
        audit=None,
        command=command,
    )


def words_of(verdict: dict[str, Any], history: pd.DataFrame) -> str:
    """Text of the page without pictures."""
    return Page(page(report_data(verdict, history), defaultdict(list))).words


class Page(HTMLParser):
    """Start tags with attributes, the words that a reader sees with single spaces, and what was left open."""

    VOID = frozenset({"meta", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        assert text.startswith("<!DOCTYPE html>")
        self.text = text
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()
        self.counts = Counter(tag for tag, _ in self.tags)
        self.words = " ".join(" ".join(self.data).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.data.append(data)
