"""Cases of `docs/identity.html` from the catalogue: the code to read, and the recorded word and reason.

`python -m experiments.audit.cases_for_page` writes them into the page, from `catalogue.md`, `sentences.csv` and the
code of `spellings.py`. With `--ask` the audit runs first, and its results are recorded in `sentences.csv`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments.audit import spellings
from experiments.audit.catalogue import CATALOGUE

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "identity.html"
RECORDED = FOLDER / "catalogue.md"
SENTENCES = FOLDER / "sentences.csv"
OPENING, CLOSING = '<script type="application/json" id="cases">', "</script>"

WORDS = {
    "identical": "Gradients equal bit for bit, values to rounding.",
    "rounding": "Gradients equal up to floating-point rounding.",
    "offset": "The same gradients; the values differ by what no logit moves.",
    "scaled": "The gradient is k times the other's, k a constant.",
    "reweighted": "The gradient is k times the other's, and k moves with the batch.",
    "domain": "The same for ordinary rows, broken elsewhere: clipping, saturation.",
    "different": "Another function.",
}


def ask() -> Iterator[tuple[str, str, str]]:
    """Audit every case and return (row, word, sentence) of each; takes half a minute."""
    from likelihood_lab.audit.api import check

    for case in CATALOGUE:
        if case.fn is not None:
            found = check(case.fn, case.reference, args=case.args, reference_args=case.reference_args, **case.options)
            yield case.row, found.objective, found.sentence


def cases() -> dict[str, Any]:
    """Return the data that the page embeds: words, functions by name, and cases that name two of them."""
    table = recorded_rows()
    with SENTENCES.open(encoding="utf-8", newline="") as file:
        found = {row: (word, sentence) for row, word, sentence in list(csv.reader(file))[1:]}
    rows = []
    functions: dict[str, dict[str, str]] = {}
    for case in CATALOGUE:
        if case.fn is None:
            continue
        recorded = table[case.row]
        word, sentence = found[case.row]
        if word != recorded["objective"]:
            raise ValueError(f"row {case.row}: {SENTENCES.name} says {word}, {RECORDED.name} {recorded['objective']}")
        names = [_name(fn) for fn in (case.fn, case.reference)]
        functions |= {name: {"code": code(name), "says": describe(name)} for name in names if name in _definitions()}
        rows.append(
            {
                "row": case.row,
                "title": recorded["case"],
                "compared": [_call(case.fn, case.args), _call(case.reference, case.reference_args)],
                "options": recorded["compared"].partition("; ")[2],
                "candidate": names[0],
                "reference": names[1],
                "word": word,
                "sentence": sentence,
                "note": recorded["note"],
                "divides_by": recorded["divides by"],
                "side_effects": recorded["side effects"],
                "source": recorded["source"],
            }
        )
    return {"words": WORDS, "functions": functions, "cases": rows}


def recorded_rows() -> dict[str, dict[str, str]]:
    """Read `catalogue.md` by row."""
    head, _, *lines = [_split(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}


def _split(line: str) -> list[str]:
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" | ")]


# --- code of spellings.py


def code(name: str) -> str:
    """Return a function's source without its docstring, after the constants and helpers that it needs."""
    nodes = [_definitions()[needed] for needed in _needed(name)]
    constants = [_without_docstrings(node) for node in nodes if isinstance(node, ast.Assign)]
    others = [_without_docstrings(node) for node in nodes if not isinstance(node, ast.Assign)]
    return "\n\n".join(["\n".join(constants), *others]).strip()


def describe(name: str) -> str:
    """Return the first paragraph of its docstring, and of its helpers that are not plain functions."""
    nodes = [_definitions()[needed] for needed in _needed(name)]
    speaking = [node for node in nodes if isinstance(node, ast.ClassDef) or getattr(node, "name", "") == name]
    paragraphs = [(ast.get_docstring(node) or "").partition("\n\n")[0] for node in speaking]  # type: ignore[arg-type]
    return " ".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "func", fn).__name__)


def _call(fn: Callable[..., Any], args: Sequence[str]) -> str:
    """Return the call as one would type it: `F.kl_div(log_probs, target_probs, reduction='batchmean')`."""
    keywords = [f"{name}={value!r}" for name, value in getattr(fn, "keywords", {}).items()]
    torchs = "" if _name(fn) in _definitions() else "F."
    return f"{torchs}{_name(fn)}({', '.join([*args, *keywords])})"


@cache
def _source() -> str:
    return Path(spellings.__file__).read_text(encoding="utf-8")


@cache
def _definitions() -> dict[str, ast.stmt]:
    """Return the module's functions, classes and constants, in its order."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(_source()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def _needed(name: str) -> list[str]:
    """Return the name and all names that its code needs, in the module's order."""
    needed, waiting = set(), [name]
    while waiting:
        needed.add(waiting.pop())
        nodes = (node for known in needed for node in ast.walk(_definitions()[known]))
        waiting = [n.id for n in nodes if isinstance(n, ast.Name) and n.id in _definitions() and n.id not in needed]
    return [known for known in _definitions() if known in needed]


def _without_docstrings(definition: ast.stmt) -> str:
    lines = dict(enumerate(_source().splitlines(), 1))
    first, last = definition.lineno, definition.end_lineno or definition.lineno
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            dropped = node.body[0]
            for number in range(dropped.lineno, (dropped.end_lineno or dropped.lineno) + 1):
                del lines[number]
    kept = [lines[number] for number in range(first, last + 1) if number in lines]
    return "\n".join(line for i, line in enumerate(kept) if line or (i and not kept[i - 1].startswith("class ")))


# --- the page


def embedded(page: str) -> str:
    """Return the text between the tags that hold the cases."""
    if OPENING not in page:
        raise ValueError(f"{OPENING} is not in the page")
    return page.partition(OPENING)[2].partition(CLOSING)[0]


def with_cases(page: str) -> str:
    """Return the page with the current cases."""
    lines = json.dumps(cases(), indent=0, ensure_ascii=False).replace("</", "<\\/")
    return page.replace(OPENING + embedded(page), f"{OPENING}\n{lines}\n", 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", action="store_true", help="ask the audit and record what it finds first")
    if parser.parse_args().ask:
        findings = list(ask())
        with SENTENCES.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("row", "found", "sentence"), *findings])
    PAGE.write_text(with_cases(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
