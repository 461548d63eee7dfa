"""The report: one self-contained page that shows every finding, says every failure, and trusts no text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
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

MARGINS = {"nll": 0.02, "accuracy": 0.01, "brier": 0.005}
NLL_ALONE = {"nll": 0.02}
COMMAND = "python -m pipeline.train 'loss=[nll,ce,kl]' 'seed=range(3)'"
STEPS = (10, 20, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report: one loss that equals the reference in every bit, one that does not."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, found(*findings(["nll", "brier"], margins=MARGINS)))
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def equals(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Every loss equals the reference in every bit."""
    return report(tmp_path_factory.mktemp("equals"), *findings(["nll", "kl"]))


def test_page_is_self_contained(whole: Page) -> None:
    loading = {"src", "srcset", "data", "href", "xlink:href", "action", "poster"}
    loads = [value for _, attributes in whole.tags for name, value in attributes.items() if name in loading]
    assert loads  # markers are drawn by reference
    assert all(value.startswith("#") for value in loads)
    assert "script" not in whole.counts
    assert not re.search(r"@import|url\((?!#)", whole.text)


def test_tags_are_balanced_and_ids_unique_across_pictures(whole: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in whole.tags if "id" in attributes)
    assert whole.counts["svg"] == 7  # three forests, a smallest margin, the distances, two learning curves
    assert whole.open == []
    assert [name for name, count in ids.items() if count > 1] == []
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', whole.text)) <= ids.keys()


def test_every_picture_is_a_file_and_has_a_text_for_those_who_cannot_see_it(whole: Page, folder: Path) -> None:
    pictures = [attributes for tag, attributes in whole.tags if tag == "svg"]
    files = sorted(path.stem for path in (folder / "figures").iterdir())
    forests = ["difference-accuracy", "difference-brier", "difference-nll"]
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 40 for picture in pictures)
    assert files == ["curve-accuracy", "curve-nll", *forests, "distance", "margin-nll"]


def test_the_same_findings_give_the_same_bytes(whole: Page, tmp_path: Path) -> None:
    assert report(tmp_path, *findings(["nll", "brier"], margins=MARGINS)).text == whole.text
    assert not re.search(r"\b20\d\d-\d\d-\d\d", whole.text)


def test_a_second_report_replaces_the_first_whole(tmp_path: Path) -> None:
    report(tmp_path, *findings(["nll"]))
    report(tmp_path, *findings([]))
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["curve-nll.svg", "report.html"]  # nothing of the comparisons is left


def test_text_is_escaped_wherever_a_name_appears(tmp_path: Path) -> None:
    seen = report(tmp_path, *findings(["<b>&$x_$", "nll"]), command="echo '</pre><script>'")
    assert "<b>" not in seen.text
    assert not {"b", "script"} & seen.counts.keys()
    assert seen.words.count("<b>&$x_$") >= 8  # headline, tables, and the labels in each picture
    assert "echo '</pre><script>'" in seen.words


def test_a_name_that_no_font_can_draw_or_no_axis_can_hold_still_gives_a_page(tmp_path: Path) -> None:
    verdict, history, _ = findings(["交叉熵", "a_very_long_name_" * 8, "_private"])
    words = report(tmp_path, verdict, history).words
    pictures = words.split("Learning curves")[1]
    assert all(name in pictures for name in ("交叉熵", "a_very_long_name_a_very…", "_private"))


def test_equal_curves_are_drawn_once_and_named_together(equals: Page) -> None:
    assert "One line, equal in every value: ce, nll and kl." in equals.words
    assert "ce = nll = kl" in equals.words


def test_curves_that_differ_in_the_last_bit_are_not_called_equal(tmp_path: Path) -> None:
    verdict, history, _ = findings(["nll"])
    history = history[history["metric"] == "val/nll"]
    history.loc[history.index[-1], "value"] = np.nextafter(history["value"].iloc[-1], 9.0)
    assert "One line" not in report(tmp_path, verdict, history).words


def test_exact_zeros_are_said_and_have_a_labelled_floor(equals: Page, whole: Page) -> None:
    assert equals.words.count("all 3 exactly 0") >= 2
    assert "at every recorded step of every seed: kl and nll." in equals.words
    assert "0 (bitwise equal)" in equals.words
    assert "0 (bitwise equal)" in whole.words


def test_a_positive_distance_has_no_floor(tmp_path: Path) -> None:
    verdict, history, _ = findings(["brier"])
    assert "bitwise equal" not in report(tmp_path, verdict, history).words


def test_failed_pairs_are_counted_beside_their_row(tmp_path: Path) -> None:
    verdict, history, differences = findings(["brier"])
    differences.loc[differences["seed"] > 0, "difference"] = np.nan
    assert "2 failed, 1 differ" in report(tmp_path, verdict, history, differences).words


def test_recorded_failures_are_listed_with_seed_step_and_cause() -> None:
    verdict, history, _ = findings(["brier"])
    causes = [{"seed": seed, "step": 17, "cause": "the objective is not finite"} for seed in (1, 2)]
    verdict["comparisons"][0]["failures"] = causes
    assert "brier 1, 2 17 the objective is not finite" in words_of(verdict, history)


def test_a_run_that_stops_being_finite_ends_in_a_cross(tmp_path: Path) -> None:
    verdict, history, _ = findings(["brier"])
    broken = (history["loss"] == "ce") & (history["seed"] == 2) & (history["step"] >= 20)
    history.loc[broken, "value"] = np.nan
    assert "A cross ends each seed that stopped being finite: ce." in report(tmp_path, verdict, history).words


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_reported_though_nobody_recorded_it(broken: float) -> None:
    verdict, history, _ = findings(["brier"])
    rows = (history["loss"] == "ce") & (history["seed"] == 2) & (history["step"] >= 20)
    history.loc[rows & (history["metric"] == "val/nll"), "value"] = broken
    assert "ce 2 20 val/nll is not finite" in words_of(verdict, history)


def test_a_loss_that_is_never_finite_is_named_though_it_has_no_line(tmp_path: Path) -> None:
    verdict, history, differences = findings(["kl_literal"])
    history.loc[history["loss"] == "kl_literal", "value"] = np.nan
    differences["difference"] = np.nan
    made = found(verdict, history, differences)
    made.distances["value"] = np.nan
    seen = Page(write_report(tmp_path, made).read_text(encoding="utf-8"))
    assert seen.words.count("Not drawn, never finite: kl_literal.") >= 2
    assert "3 failed" in seen.words


def test_a_run_without_any_result_is_reported() -> None:
    verdict, history, _ = findings(["brier"])
    history = history[(history["loss"] != "brier") | (history["seed"] != 1)]
    assert "brier 1 — no recorded result" in words_of(verdict, history)


def test_a_single_run_claims_nothing_and_still_shows_what_it_reached(tmp_path: Path) -> None:
    verdict, history, _ = findings([], seeds=1)
    words = report(tmp_path, verdict, history).words
    assert "ce trained alone (mlp on digits, 1 seed): nothing was compared." in words
    assert "One seed." in words
    assert "Test set, after the last step" in words
    assert "Estimand" not in words
    assert "Failed runs" not in words


def test_a_metric_without_a_margin_says_that_equivalence_is_not_judged_by_it(tmp_path: Path) -> None:
    verdict, history, differences = findings(["brier", "nll"])
    verdict["protocol"]["margins"] = None
    words = report(tmp_path, verdict, history, differences).words
    assert "It has no margin: equivalence is not judged by it." in words
    assert "units of the margin" not in words


def test_nulls_everywhere_give_a_page_that_asserts_nothing() -> None:
    verdict, history, _ = findings(["brier"])
    verdict["comparisons"] = [dict.fromkeys(row) | {"loss": row["loss"]} for row in verdict["comparisons"]]
    verdict |= dict.fromkeys(("environment", "protocol", "optimizer", "precision", "sweep"))
    words = words_of(verdict, history)
    assert "brier is not compared with ce" in words
    assert "None" not in words


@pytest.mark.parametrize(("confirmed", "word"), [(True, "holds"), (False, "refuted"), (None, "undecided")])
def test_an_expectation_is_shown_with_what_became_of_it(confirmed: bool | None, word: str) -> None:
    verdict, history, _ = findings(["brier"])
    verdict["comparisons"][0] |= {"expected": "same", "confirmed": confirmed}
    assert f"same: {word}" in words_of(verdict, history)


def test_losses_of_one_verdict_share_a_clause_and_sameness_comes_first() -> None:
    verdict, history, _ = findings(["brier", "nll", "kl"])
    assert headline(verdict, history) == (
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
def test_json_values_read_as_prose(value: Any, text: str) -> None:
    assert prose(value) == text


def test_fifteen_losses_and_thirty_seeds_stay_under_three_megabytes(tmp_path: Path) -> None:
    losses = [f"loss_{i}" for i in range(14)]
    seen = report(tmp_path, *findings(losses, seeds=30, steps=range(10, 2010, 10), margins=MARGINS))
    assert len(seen.text.encode()) < 3_000_000
    assert seen.counts["svg"] == 7


# ---------------------------------------------------------------- controls


def with_controls(dose: str = "different") -> ReportData:
    """One loss, a placebo that is nearly equal, and a dose at two margins."""
    verdict, history, differences = findings(["brier"])
    added = [(name, "nll", seed, True, size * 0.02) for name, size in CONTROLS.items() for seed in range(3)]
    distances = [(name, seed, step, True, 1e-8 * step) for name in CONTROLS for seed in range(3) for step in (1, 3, 10)]
    metric = {"margin": 0.02, "p_tost": 0.1, "n": 3, "pair_correlation": None}
    verdict["controls"] = {
        "replay": {"seed": 0, "bitwise": True},
        "outcomes": {"placebo_float64": "equivalent", "dose": dose},
        "metrics": {
            name: {"nll": metric | {"mean_difference": size * 0.02, "ci_tost": [0.0, size * 0.02]}}
            for name, size in CONTROLS.items()
        },
    }
    whole = found(verdict, history, differences)
    return replace(
        whole,
        differences=pd.concat([differences, pd.DataFrame(added, columns=differences.columns)]),
        distances=pd.concat([whole.distances, pd.DataFrame(distances, columns=whole.distances.columns)]),
    )


CONTROLS = {"placebo_float64": 0.01, "dose": 2.0}
AUDIT = {
    "reference": "ce",
    "losses": {
        "brier": {
            "objective": "different",
            "would_have_caught": {
                "label smoothing": {"float32": 3e-6, "float64": 1e-14, "float32 inside float64": 1e-7},
                "epsilon in the log": {"float32": None, "float64": None},
            },
        }
    },
}


def test_controls_stand_below_the_losses_on_the_same_axes(tmp_path: Path) -> None:
    seen = Page(write_report(tmp_path, with_controls()).read_text(encoding="utf-8"))
    assert "Below the line: controls that the trial added." in seen.words
    assert "Hatched: the placebos" in seen.words
    forest = (tmp_path / "figures" / "difference-nll.svg").read_text()
    margins = (tmp_path / "figures" / "margin-nll.svg").read_text()
    for picture in (forest, margins):
        places = [picture.index(f">{name}<") for name in ("brier", "placebo_float64", "dose")]
        assert places == sorted(places)
    assert "placebo_float64: 0.0002; dose: 0.04" in seen.text


def test_the_losses_gradients_are_drawn_where_they_were_audited(tmp_path: Path) -> None:
    path = write_report(tmp_path, replace(with_controls(), audit=AUDIT))
    assert {"audit_strip.svg", "p_minus_y.svg"} <= {file.name for file in (tmp_path / "figures").iterdir()}
    assert "The losses themselves" in path.read_text(encoding="utf-8")
    write_report(tmp_path, with_controls())
    assert not (tmp_path / "figures" / "audit_strip.svg").exists()


# ---------------------------------------------------------------- what a sceptic asks first


def test_how_small_is_answered_for_losses_first_steps_and_outcome() -> None:
    made = with_controls()
    made.verdict["comparisons"][0] |= {"envelope": {"smallest": 1e-5}, "outcome": "equivalent"}
    losses, steps, own, placebos = smallest_detectable(made.verdict, AUDIT)
    assert losses == "In the losses themselves: label smoothing by 3e-06 in float32 and 1e-14 in float64."
    assert steps == "In the first steps of training: label smoothing 1e-05, as recorded on digits with an MLP."
    assert own.startswith("In the outcome of brier: a difference beyond nll 0.")
    assert placebos.startswith("At best these seeds could show nll 0.0002 where 0.02 was asked")


def test_placebos_that_were_not_shown_equal_show_nothing() -> None:
    made = with_controls()
    made.verdict["controls"]["outcomes"]["placebo_float64"] = "inconclusive"
    assert not any("At best" in line for line in smallest_detectable(made.verdict, AUDIT))


def test_the_ladder_is_the_largest_over_losses_and_none_of_a_loss_that_could_not_be_asked() -> None:
    verdict, *_ = findings(["brier", "nll"])
    coarser = {"objective": "rounding", "would_have_caught": {"label smoothing": {"float32": 1e-3, "float64": None}}}
    both = {"reference": "ce", "losses": {**AUDIT["losses"], "nll": coarser}}  # type: ignore[dict-item]
    assert smallest_detectable(verdict, both)[0] == "In the losses themselves: label smoothing by 1e-03 in float32."
    failed = {
        "reference": "ce",
        "losses": {"brier": {"objective": "error", "would_have_caught": {"a": {"float32": 1}}}},
    }
    assert "not audited" in smallest_detectable(verdict, failed)[0]
    assert not any("kinds were planted" in line for line in what_was_detected(verdict, failed))


def test_how_small_without_controls_is_each_loss_s_own() -> None:
    verdict, *_ = findings(["brier", "nll", "reverse_kl"])
    verdict["comparisons"][0]["outcome"] = "inconclusive"  # the last is different: nothing hides there
    unknown, equal, brier = smallest_detectable(verdict, None)
    assert "not audited" in unknown
    assert equal == "In the trained models: one bit of any weight in any pair (nll)."
    assert brier.startswith("In the outcome of brier: a difference beyond nll 0.")


def test_a_dose_that_moves_too_little_is_no_test_of_the_study() -> None:
    made = with_controls("equivalent")
    made.verdict["controls"]["metrics"]["dose"]["nll"]["mean_difference"] = 0.4 * 0.02
    said = what_was_detected(made.verdict, None)[0]
    assert "moves nll by 0.4 margins, was called equivalent. That is too little to notice" in said


@pytest.mark.parametrize(
    ("dose", "answer"),
    [("different", "Yes, in training"), ("inconclusive", "Not in training"), ("equivalent", "Not in")],
)
def test_whether_it_ever_said_no_is_what_became_of_the_dose(dose: str, answer: str) -> None:
    said = what_was_detected(with_controls(dose).verdict, AUDIT)
    assert said[0].startswith(answer)
    assert "moves nll by 2 margins" in said[0]
    assert said[1].startswith("And yes where it should")
    assert "Yes, of what was asked about: brier." in said
    assert "faults of 1 of 2 kinds were planted and caught" in said[3]
    assert said[-1] == "The reference, trained once more in another place, got the same bits."


def test_placebos_that_were_not_shown_equal_are_no_yes() -> None:
    made = with_controls()
    made.verdict["controls"]["outcomes"]["placebo_float64"] = "inconclusive"
    assert what_was_detected(made.verdict, None)[1].startswith("Nor did it say yes where it should")


def test_where_nothing_was_planted_and_nothing_found_that_is_the_answer() -> None:
    verdict, *_ = findings(["nll"])
    assert what_was_detected(verdict, None)[0].startswith("Not in this trial: nothing different was planted")
    verdict["controls"] = {"replay": {"seed": 0, "bitwise": False}}
    assert "not deterministic" in what_was_detected(verdict, None)[-1]


def test_both_questions_stand_before_the_verdict(whole: Page) -> None:
    order = ["How small a difference would this have noticed?", "Did it ever say no?", "Verdict"]
    places = [whole.words.index(heading) for heading in order]
    assert places == sorted(places)


# ---------------------------------------------------------------- findings made up

Made = tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]


def findings(
    losses: Sequence[str],
    seeds: int = 3,
    steps: Sequence[int] = STEPS,
    margins: Mapping[str, float] = NLL_ALONE,
) -> Made:
    """`nll` and `kl` equal the reference `ce` in every bit; every other loss is its own."""
    runs = [run(loss, seed, np.array(steps), margins) for loss in ["ce", *losses] for seed in range(seeds)]
    rows = [
        (loss, metric, seed, False, offset(loss) * margin * (5 + seed))
        for loss in losses
        for metric, margin in margins.items()
        for seed in range(seeds)
    ]
    verdict = {
        **{"schema": 1, "sweep": "digits-mlp", "about": "objective", "reference": "ce", "dataset": "digits"},
        **{"model": "mlp", "optimizer": "sgd", "precision": "float32", "seeds": list(range(seeds))},
        "environment": {"torch": "2.14.1", "device": "cpu"},
        "protocol": {"hash": "0f", "alpha": 0.05, "looks": 1, "look": 1, "margins": dict(margins), "primary": ["nll"]},
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
    numbers = {"level": 0.9, "p_tost": None, "n": 3, "pair_correlation": 0.5, "ci_difference": None}
    nulls = ("scale", "offset", "domain", "side_effects", "seeds_needed", "expected", "confirmed")
    return {
        **dict.fromkeys((*nulls, "assay_sensitivity", "would_have_caught")),
        **{"loss": loss, "objective": "not_run", "outcome": word, "verdict": word, "sentence": f"{word}."},
        **{"covered": ["the final weights"], "not_covered": ["the losses"], "failures": []},
        "metrics": {
            name: numbers
            | {"mean_difference": 6 * far * margin, "margin": margin}
            | {"ci_tost": [4 * far * margin, 8 * far * margin] if far else None}
            for name, margin in margins.items()
        },
    }


def report(
    folder: Path,
    verdict: dict[str, Any],
    history: pd.DataFrame,
    differences: pd.DataFrame | None = None,
    command: str = COMMAND,
) -> Page:
    path = write_report(folder, found(verdict, history, differences, command=command))
    return Page(path.read_text(encoding="utf-8"))


def found(
    verdict: dict[str, Any], history: pd.DataFrame, differences: pd.DataFrame | None = None, **more: Any
) -> ReportData:
    """What a report is made of; weights part as each loss's `offset` says."""
    losses = [loss for loss in history["loss"].unique() if loss != verdict["reference"]]
    rows = [
        (loss, seed, step, False, offset(loss) * 1e-8 * step)
        for loss in losses
        for seed in verdict["seeds"]
        for step in (1, 3, 10)
    ]
    between = [(step, 0.5 + step / 100) for step in (1, 3, 10)]
    tables = {
        "differences": pd.DataFrame() if differences is None else differences,
        "distances": pd.DataFrame(rows, columns=["loss", "seed", "step", "control", "value"]),
        "between_seeds": pd.DataFrame(between, columns=["step", "value"]),
    }
    return ReportData(**{"verdict": verdict, "history": history, **tables, "audit": None, "command": COMMAND, **more})


def words_of(verdict: dict[str, Any], history: pd.DataFrame) -> str:
    """What the page says around its pictures."""
    return Page(page(found(verdict, history), {})).words


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
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.data.append(data)
