"""Pictures of an audit: every loss has its place or a word instead, and no text is cut or covered."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from pipeline.reporting.audit_figures import write_audit_figures
from pipeline.reporting.plotting import COLOURS, INK, PAPER, WIDTH
from pipeline.text import MINUS

NAN, INF = math.nan, math.inf
P_MINUS_Y = (0.1, -0.8, 0.7)
THIRD = tuple(value / 3 for value in P_MINUS_Y)
OUTLINE = f"fill: none; stroke: {INK}; stroke-width: 1.2"
SVG = "{http://www.w3.org/2000/svg}"


def test_pictures_are_written_and_other_files_kept(tmp_path: Path) -> None:
    assert write_audit_figures(tmp_path, audit({})) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curve-nll.svg").write_text("another picture")
    written = write_audit_figures(tmp_path, audit({"nll": loss()}))
    assert written == [tmp_path / "figures" / "audit_strip.svg", tmp_path / "figures" / "p_minus_y.svg"]
    assert {path.name for path in tmp_path.rglob("*.*")} == {"audit_strip.svg", "curve-nll.svg", "p_minus_y.svg"}


def test_pictures_are_deterministic_in_replaceable_colours(tmp_path: Path) -> None:
    first, again, other = (
        [path.read_text(encoding="utf-8") for path in write_audit_figures(tmp_path, audit(many(count)))]
        for count in (3, 3, 4)
    )
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    for text in first:
        colours = {INK, PAPER, "#808890", COLOURS[0], COLOURS[1]}
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", text)) == colours


@pytest.mark.parametrize("count", [1, 2, 3, 4, 25])
def test_losses_and_classes_are_named_and_no_text_overlaps(tmp_path: Path, count: int) -> None:
    losses = many(count)
    strip, bars = draw(tmp_path, losses)
    for picture in (strip, bars):
        assert all(picture.words.count(name) == 1 for name in losses)
        assert [text for text in picture.words if text in {"domain", "rounding", "scaled, 1/C"}] == [
            ("rounding", "scaled, 1/C", "domain")[place % 3] for place in range(count)
        ]
        picture.check_texts()
    assert [bars.words.count(name) for name in ("cat", "dog", "other")] == [min(3, count)] * 3  # lowest panels


def test_long_names_and_formulas_fit(tmp_path: Path) -> None:
    name = "log_of_probability_plus_epsilon"
    losses = {f"{i}_{name}": loss("reweighted", 3e-8, NAN) for i in range(4)} | {"ab": loss(formula="1/(N C T)")}
    for picture in draw(tmp_path, losses, reference="a_reference_with_a_long_name_too"):
        assert picture.words.count("0_log_of_probability_pl…") == 1
        assert not any("N C T" in text for text in picture.words)
        picture.check_texts()


def test_alternative_text_has_names_escaped_and_numbers(tmp_path: Path) -> None:
    losses = {"<b>&$x_$": loss("rounding", 3e-8, 0.0), "argmax": loss("different", None, None, gradient=None)}
    strip, bars = draw(tmp_path, losses)
    assert strip.root.get("role") == bars.root.get("role") == "img"
    assert "<b>&$x_$: rounding, float32 3e-08, float64 0; argmax: different, no gradient." in strip.alt
    assert f"<b>&$x_$: 0.1, {MINUS}0.8, 0.7; argmax: no gradient." in bars.alt
    assert all("<b>&$x_$" in picture.words for picture in (strip, bars))


# ---------------------------------------------------------------- the strip


def test_strip_places_distances_on_one_logarithmic_axis(tmp_path: Path) -> None:
    """A line joins the two precisions of a loss. 0 has a column of its own, left of every decade."""
    losses = {"nll": loss("rounding", 1e-6, 1e-15), "kl_mean": loss("scaled", 1.0, 1.0)}
    losses |= {"ce": loss("identical", 0.0, 0.0), "kl": loss("rounding", 3e-8, 0.0)}
    strip, _ = draw(tmp_path, losses)
    ticks, markers = strip.ticks(), strip.markers()
    assert markers["nll"] == pytest.approx((ticks["1e-6"], ticks["1e-15"]))
    assert markers["kl_mean"] == pytest.approx((ticks["1e0"], ticks["1e0"]))
    assert markers["ce"] == pytest.approx((ticks["0"], ticks["0"]))
    assert markers["kl"][1] == pytest.approx(ticks["0"])
    assert ticks["0"] == min(ticks.values()) < min(*markers["nll"], markers["kl"][0]) - 10
    lines = [x for style, x, _ in strip.paths() if f"stroke: {COLOURS[0]}; stroke-width: 2" in style]
    assert lines[0] == pytest.approx([ticks["1e-6"], ticks["1e-15"]])
    assert any("or bitwise equality at 0." in text for text in strip.words)


@pytest.mark.parametrize("extreme", [5e-324, 1e-40, 1e38, 1.7e308])
def test_strip_reaches_every_float(tmp_path: Path, extreme: float) -> None:
    strip, _ = draw(tmp_path, {"ce": loss("identical", 0.0, 0.0), "far": loss("different", extreme, extreme)})
    assert strip.ticks()["0"] + 10 < strip.markers()["far"][0] < WIDTH * 72
    strip.check_texts()


@pytest.mark.parametrize(
    ("r32", "r64", "word"),
    [
        (None, None, "no number"),
        (NAN, NAN, "no number"),
        (INF, INF, "infinite"),
        (INF, None, "float32: infinite, float64: no number"),
        (1e-7, None, "float64: no number"),
        (0.5, NAN, "float64: no number"),
        (INF, 0.5, "float32: infinite"),
    ],
)
def test_strip_describes_values_without_a_place(
    tmp_path: Path, r32: float | None, r64: float | None, word: str
) -> None:
    strip, _ = draw(tmp_path, {"odd": loss("different", r32, r64), "ce": loss("identical", 0.0, 0.0)})
    finite = [r for r in (r32, r64) if r is not None and math.isfinite(r)]
    assert [text for text in strip.words if re.search("no number|infinite|gradient$", text)] == [word]
    assert len(strip.markers()["odd"]) == len(finite)
    assert word in strip.alt
    left, right, *_ = strip.box(word)
    assert all(place < left or right < place for place in strip.markers()["odd"])
    assert left > strip.ticks()["0"] + 4  # never in the column that means equal
    strip.check_texts()


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"objective": "not_run", "evidence": {"r32": None, "r64": None, "example": None}}, "not measured"),
        ({"objective": "error", "evidence": None}, "not measured"),
        ({"objective": None}, "not measured"),
        (None, "no gradient"),
    ],
)
def test_loss_without_gradient_has_a_word_in_both_pictures(
    tmp_path: Path, entry: dict[str, Any] | None, word: str
) -> None:
    """The first loss may be the one without; the example is described all the same."""
    odd = entry or loss("different", None, None, gradient=None)
    pictures = draw(tmp_path, {"odd": odd, "ce": loss("identical", 0.0, 0.0)})
    for picture in pictures:
        assert picture.words.count(word) == 1
        assert (odd["objective"] or "not_run").replace("_", " ") in picture.words
        picture.check_texts()
    text = " ".join(pictures[1].words)
    assert "label dog; probabilities: cat 0.1, dog 0.2, other 0.7." in text
    assert "outline: that of ce." in text


# ---------------------------------------------------------------- p - y


def test_bars_fill_the_outline_if_the_gradient_is_the_reference_s(tmp_path: Path) -> None:
    """The outline lies on top of the bars. Another loss's huge gradient leaves them their size."""
    losses = {"nll": loss("identical", 0.0, 0.0), "kl_mean": loss("scaled", gradient=THIRD)}
    _, bars = draw(tmp_path, losses)
    outlines = bars.heights(OUTLINE)
    unit = outlines[0] / 0.1
    assert unit > 0
    assert outlines == pytest.approx([unit * value for value in (*P_MINUS_Y, *P_MINUS_Y)], rel=1e-4)
    assert bars.heights(f"fill: {COLOURS[0]}") == pytest.approx(outlines[:3], rel=1e-4)
    assert bars.heights(f"fill: {COLOURS[1]}") == pytest.approx([unit * value for value in THIRD], rel=1e-4)
    styles = [style for style, _, _ in bars.paths()]
    last_bar = max(place for place, style in enumerate(styles) if f"fill: {COLOURS[1]}" in style)
    assert last_bar < [place for place, style in enumerate(styles) if OUTLINE in style][-3]
    _, beside = draw(tmp_path, {"nll": losses["nll"], "sum": loss("scaled", gradient=(1e9, -8e9, 7e9))})
    assert beside.heights(f"fill: {COLOURS[0]}") == pytest.approx(outlines[:3], rel=1e-4)


@pytest.mark.parametrize(
    ("gradient", "figures"),
    [
        ((0.0, 0.0, 0.0), ["0", "0", "0"]),
        ((0.1, NAN, 0.7), ["NaN"]),
        ((None, None, None), ["NaN", "NaN", "NaN"]),
        ((INF, -INF, 0.7), ["inf", f"{MINUS}inf"]),
        ((5.0, -40.0, 35.0), ["5", f"{MINUS}40", "35"]),
        ((1e-12, -0.8, 0.7), [f"1e{MINUS}12"]),
        ((-3.2e7, -0.8, 0.7), [f"{MINUS}3e+07"]),
        (P_MINUS_Y, []),
    ],
)
def test_value_that_a_bar_cannot_show_is_written(
    tmp_path: Path, gradient: Sequence[float | None], figures: list[str]
) -> None:
    _, bars = draw(tmp_path, {"odd": loss("different", gradient=gradient)})
    axis = {"0", "1", f"{MINUS}1"}
    seen = [text for text in bars.words if re.fullmatch(rf"{MINUS}?(\d[\de+{MINUS}]*|inf|NaN)", text)]
    assert [text for text in seen if text not in axis] == [text for text in figures if text not in axis]
    assert seen.count("0") == 1 + figures.count("0")
    assert len(bars.heights(f"fill: {COLOURS[1]}")) == 3 - figures.count("NaN")
    bars.check_texts()


def test_value_beyond_the_axis_is_written_at_its_end(tmp_path: Path) -> None:
    _, bars = draw(tmp_path, {"sum": loss("scaled", gradient=(5.0, -40.0, 35.0))})
    outlines = [ys for style, _, ys in bars.paths() if OUTLINE in style]
    assert bars.box("35")[3] < min(outlines[2]) + 1
    assert bars.box(f"{MINUS}40")[2] > max(outlines[1]) - 1


def test_reference_without_numbers_has_no_outline(tmp_path: Path) -> None:
    entry = loss("different")
    entry["evidence"]["example"]["reference_gradient"] = [None, NAN, None]
    _, bars = draw(tmp_path, {"nll": entry})
    assert bars.heights("stroke-width: 1.2") == []
    assert len(bars.heights(f"fill: {COLOURS[1]}")) == 3


# ---------------------------------------------------------------- made-up audits, and pictures read back


def loss(
    objective: str = "rounding",
    r32: float | None = 6e-8,
    r64: float | None = 1e-16,
    gradient: Sequence[float | None] | None = P_MINUS_Y,
    formula: str | None = None,
) -> dict[str, Any]:
    example = {
        **{"classes": ["cat", "dog", "other"], "probs": [0.1, 0.2, 0.7], "label": 1},
        **{"gradient": gradient, "reference_gradient": list(P_MINUS_Y)},
    }
    return {
        "objective": objective,
        "scale": formula and {"formula": formula, "by_classes": {"10": 0.1}},
        "evidence": {"r32": r32, "r64": r64, "rho": None, "example": example},
    }


def many(count: int) -> dict[str, Any]:
    kinds = [loss(), loss("scaled", 0.667, 0.667, THIRD, "1/C"), loss("domain", 8e-8, 3e-17)]
    return {f"loss_{place}": kinds[place % 3] for place in range(count)}


def audit(losses: Mapping[str, Any], reference: str = "ce") -> dict[str, Any]:
    return {"schema": 1, "reference": reference, "losses": losses}


def draw(folder: Path, losses: Mapping[str, Any], reference: str = "ce") -> tuple[Drawn, Drawn]:
    strip, bars = write_audit_figures(folder, audit(losses, reference))
    return Drawn(strip), Drawn(bars)


class Drawn:
    """A picture read back: its words in order, and where they, the markers and the bars are, in points."""

    def __init__(self, path: Path) -> None:
        self.root = ET.parse(path).getroot()  # noqa: S314
        assert self.root.tag == f"{SVG}svg"
        self.texts = list(self.root.iter(f"{SVG}text"))
        self.words = [text.text or "" for text in self.texts]
        self.alt = self.root.get("aria-label", "")

    def box(self, words: str) -> tuple[float, float, float, float]:
        """Left, right, top and bottom of the first text that says `words`."""
        return _box(self.texts[self.words.index(words)])

    def check_texts(self) -> None:
        """No text leaves the picture, and no two share ground; a point of slack for rounding."""
        width, height = (float(number) for number in self.root.get("viewBox", "").split()[2:])
        boxes = {(place, words): _box(self.texts[place]) for place, words in enumerate(self.words)}
        cut = [key for key, (x0, x1, y0, y1) in boxes.items() if min(x0, y0, width - x1, height - y1) < -1]
        pairs = combinations(boxes.items(), 2)
        covered = [(a, b) for (a, p), (b, q) in pairs if _shared(p[:2], q[:2]) > 1 and _shared(p[2:], q[2:]) > 2]
        assert (cut, covered) == ([], [])

    def ticks(self) -> dict[str, float]:
        """Label -> x of the axis of decades."""
        return {
            words: float(text.get("x", "nan"))
            for words, text in zip(self.words, self.texts, strict=True)
            if re.fullmatch(r"0|1e-?\d+", words)
        }

    def markers(self) -> dict[str, tuple[float, ...]]:
        """Name of the row -> x of its markers: float32 first, where it has one."""
        rows = {
            float(text.get("y", "nan")): words
            for words, text in zip(self.words, self.texts, strict=True)
            if "text-anchor: end" in text.get("style", "") and "9px" in text.get("style", "")
        }
        found: dict[str, list[float]] = {name: [] for name in rows.values()}
        for use in self.root.iter(f"{SVG}use"):
            if re.search(f"{COLOURS[0]}|{COLOURS[1]}", use.get("style", "")):
                baseline = min(rows, key=lambda y: abs(y - float(use.get("y", "nan"))))
                found[rows[baseline]].append(float(use.get("x", "nan")))
        return {name: tuple(places) for name, places in found.items()}

    def paths(self) -> list[tuple[str, list[float], list[float]]]:
        """Style, xs and ys of every path, in the order of drawing."""
        return [
            (path.get("style", ""), *([float(p[i]) for p in _points(path)] for i in (0, 1)))
            for path in self.root.iter(f"{SVG}path")
        ]

    def heights(self, style: str) -> list[float]:
        """Signed heights of the bars of a style, upwards positive; each path starts on the base line."""
        bars = [ys for own, _, ys in self.paths() if style in own and len(ys) >= 4 and ys]
        return [ys[0] - ys[2] for ys in bars]


def _points(path: ET.Element) -> list[tuple[str, str]]:
    return re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d", ""))


def _box(text: ET.Element) -> tuple[float, float, float, float]:
    style, move = text.get("style", ""), re.search(r"translate\(([\d.]+) ([\d.]+)\)", text.get("transform", ""))
    x, y = move.groups() if move else (text.get("x", "nan"), text.get("y", "nan"))
    size = float(re.search(r"font-size: ([\d.]+)px", style).group(1))  # type: ignore[union-attr]
    font = FontProperties(family="DejaVu Sans", size=size)
    width, height, descent = text_to_path.get_text_width_height_descent(text.text or "", font, False)
    anchor = 0.0 if "text-anchor: start" in style else 0.5 if "middle" in style else float("text-anchor: end" in style)
    left, base = float(x) - anchor * width, float(y)
    return left, left + width, base - height + descent, base + descent


def _shared(one: Sequence[float], two: Sequence[float]) -> float:
    return min(one[1], two[1]) - max(one[0], two[0])
