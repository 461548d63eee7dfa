"""Compare the audit's word with the truth for every known pair, beside a plain allclose test.

    python -m experiments.audit.confusion --markdown --csv experiments/audit/confusion.csv

Exit code 1 if a pair is called the same that is not.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.audit.pairs import Pair, pairs
from experiments.audit.plain import TESTS, plain_test
from experiments.audit.tables import environment, markdown
from likelihood_lab.audit.api import check
from likelihood_lab.audit.finding import Finding

WORDS = ("identical", "rounding", "offset", "domain", "scaled", "reweighted", "different", "not_run", "error")
ORIGINS = {
    "catalogue": "the catalogue", "package": "losses of other packages", "mutant": "mutants",
    "honest": "honest re-roundings", "planted": "planted faults",
}  # fmt: skip
UNTRUE = ("not_run", "error")  # no gradient: neither the same nor another


@dataclass(frozen=True)
class Answer:
    """Results of the audit and of the plain test for one pair."""

    pair: Pair
    finding: Finding
    plain: Mapping[str, bool] | None

    @property
    def expected(self) -> str:
        """Expected word; a correct form is `identical` if it happens to give the reference's bits."""
        if self.pair.origin == "honest" and self.finding.objective == "identical":
            return "identical"
        return self.pair.case.objective or ""

    @property
    def missed_effects(self) -> list[str]:
        """Expected side effects that the audit did not report."""
        found = self.finding.side_effects
        return [effect for effect in self.pair.case.side_effects if not any(e.startswith(effect) for e in found)]


def ask(pair: Pair) -> Answer:
    """Audit a pair, then run the plain test; the order matters because some candidates count their calls."""
    case = pair.case
    with _quiet():
        finding = check(pair.make(), case.reference, args=case.args, reference_args=case.reference_args, **case.options)
        return Answer(pair, finding, plain_test(pair.make(), case))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def report(answers: Sequence[Answer], skipped: Sequence[str]) -> str:
    """Return the study as Markdown."""
    judged = [answer for answer in answers if answer.pair.origin != "below the limit"]
    below = [answer for answer in answers if answer.pair.origin == "below the limit"]
    return "\n\n".join(
        [
            f"{environment()}." + (f" Not importable here: {', '.join(skipped)}." if skipped else ""),
            _summary(judged),
            "## Found word by expected word\n\n" + _matrix(judged),
            "## Where the pairs come from\n\n" + _origins(judged),
            "## Beside a plain test\n\n" + _beside(judged),
            "## Below what is caught\n\n" + _below(below),
        ]
    )


def _summary(answers: Sequence[Answer]) -> str:
    agreeing = sum(a.finding.objective == a.expected for a in answers)
    lines = [f"{len(answers)} pairs, the mutants below the limit not counted; the expected word in {agreeing}."]
    false_same, accused = wrongly_same(answers), wrongly_accused(answers)
    lines.append(f"Called the same (identical, rounding or offset) though it is not: {_named(false_same)}.")
    lines.append(f"Called another though it is the same: {_named(accused)}.")
    others = [a for a in answers if a.finding.objective != a.expected and a not in false_same and a not in accused]
    if others:
        lines.append(f"Another word of the same kind: {_named(others)}.")
    missed = [a for a in answers if a.pair.origin == "planted" and a.missed_effects]
    lines.append(f"Planted faults whose side effect was not named: {_named(missed, effects=True)}.")
    return "\n".join(lines)


def _named(answers: Sequence[Answer], effects: bool = False) -> str:
    if not answers:
        return "none"
    told = [
        f"{a.pair.case.title} ({', '.join(a.missed_effects)})" if effects
        else f"{a.pair.case.title} ({a.expected}, found {a.finding.objective})"
        for a in answers
    ]  # fmt: skip
    return f"{len(answers)}: {'; '.join(told)}"


def wrongly_same(answers: Sequence[Answer]) -> list[Answer]:
    """Return pairs that are called the same and are not."""
    return [a for a in answers if a.finding.same and not a.pair.same]


def wrongly_accused(answers: Sequence[Answer]) -> list[Answer]:
    """Return pairs that are the same and are called another."""
    return [a for a in answers if a.pair.same and not a.finding.same]


def _matrix(answers: Sequence[Answer]) -> str:
    counts = Counter((a.expected, a.finding.objective) for a in answers)
    used = [word for word in WORDS if any(word in pair for pair in counts)]
    rows = [[word, *(counts[word, other] or "" for other in used)] for word in used]
    return markdown(["expected \\ found", *used], rows)


def _origins(answers: Sequence[Answer]) -> str:
    rows = []
    for origin, words in ORIGINS.items():
        own = [a for a in answers if a.pair.origin == origin]
        same = sum(a.pair.same for a in own)
        agreeing = sum(a.finding.objective == a.expected for a in own)
        rows.append([words, len(own), same, agreeing, len(wrongly_same(own)), len(wrongly_accused(own))])
    columns = ("pairs", "number", "truly the same", "expected word found", "false same", "falsely accused")
    return markdown(columns, rows)


def _beside(answers: Sequence[Answer]) -> str:
    """Return misses and false alarms of the plain test and of the audit on the same pairs."""
    known = [a for a in answers if a.plain is not None and a.expected not in UNTRUE]
    columns = ("judge", "same, called same", "same, called other (false alarm)", "other, called same (miss)",
               "other, called other")  # fmt: skip
    rows = [["audit", *_counts([(a.pair.same, a.finding.same) for a in known])]]
    for test in TESTS:
        rows.append(
            [f"assert_close: {test}", *_counts([(a.pair.same, bool(a.plain and a.plain[test])) for a in known])]
        )
    practice = [a for a in known if a.pair.origin in ("catalogue", "package")]
    rows.append(["audit, catalogue and packages", *_counts([(a.pair.same, a.finding.same) for a in practice])])
    plain = [(a.pair.same, bool(a.plain and a.plain[TESTS[-1]])) for a in practice]
    rows.append([f"assert_close: {TESTS[-1]}, catalogue and packages", *_counts(plain)])
    missed = Counter(a.expected for a in known if not a.pair.same and a.plain and a.plain["all of these"])
    said = ", ".join(f"{count} {word}" for word, count in missed.most_common())
    return (
        f"{len(known)} pairs that give gradients. The plain test: standard normal logits, 64 rows, 10 classes, "
        "`torch.testing.assert_close` with its default tolerances.\n\n"
        f"{markdown(columns, rows)}\n\nMissed by all four together: {said}."
    )


def _counts(pairs_: Sequence[tuple[bool, bool]]) -> list[int]:
    counts = Counter(pairs_)
    return [counts[True, True], counts[True, False], counts[False, True], counts[False, False]]


def _below(answers: Sequence[Answer]) -> str:
    """List mutants below the detection limit of float64 on the grid; only `same` can be said of them."""
    found = Counter(a.finding.objective for a in answers)
    words = ", ".join(f"{count} {word}" for word, count in found.most_common())
    names = "; ".join(a.pair.case.title for a in answers)
    return f"{len(answers)} mutants that are not equal to cross-entropy, found {words}: {names}."


def write_csv(path: Path, answers: Sequence[Answer]) -> None:
    """Write a row for each pair."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["origin", "row", "pair", "expected", "found", *TESTS])
        for a in answers:
            plain = ["" if a.plain is None else "same" if a.plain[test] else "other" for test in TESTS]
            writer.writerow(
                [a.pair.origin, a.pair.case.row, a.pair.case.title, a.expected, a.finding.objective, *plain]
            )


def _text(report_: str) -> str:
    """Return Markdown without heading marks and rules, for a terminal."""
    kept = [line.removeprefix("## ") for line in report_.splitlines() if not line.startswith("| ---")]
    return "\n".join(kept)


def main() -> int:
    """Print the study and return 1 if a pair is called the same that is not."""
    parser = argparse.ArgumentParser(prog="python -m experiments.audit.confusion", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--csv", type=Path, help="write every pair to this file")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with _quiet():
        asked, skipped = pairs()
    answers = [ask(pair) for pair in asked]
    text = report(answers, skipped)
    print(f"# The audit's confusion matrix\n\n{text}" if options.markdown else _text(text))
    if options.csv is not None:
        write_csv(options.csv, answers)
    return int(bool(wrongly_same([a for a in answers if a.pair.origin != "below the limit"])))


if __name__ == "__main__":
    sys.exit(main())
