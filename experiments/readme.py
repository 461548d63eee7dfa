"""Generate the README's tables and figure from recorded results and from the output of the commands beside them.

python -m experiments.readme            writes every block and the figure again (a minute of CPU)
python -m experiments.readme verdicts   writes one block

A block stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.results import recorded
from likelihood_lab.errors import UsageError, did_you_mean
from pipeline.entry import run_and_report

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FIGURE = ROOT / "docs" / "p_minus_y.svg"
TEXTBOOK = ROOT / "experiments" / "textbook_spellings" / "results.csv"
WIDTH = 120
NOTES = {  # what a reader needs beside the result, where the loss's own description does not say it
    "log_likelihood": ". Same minimiser as `ce`, but with 64 rows a batch its gradient is 64 times as large, "
    "too large for this learning rate"
}
ORDER = ("identical", "rounding", "equivalent", "inconclusive", "conflict", "different")
FIGURE_LOSSES = ("ce", "nll", "kl", "kl_mean", "nll_softmax", "log_likelihood", "brier")


def verdicts() -> str:
    """Table of the recorded textbook losses and their results, sorted by verdict from `identical` to `different`."""
    table = recorded(TEXTBOOK)
    shown = table[(table["metric"] == "nll") & (table["kind"] == "candidate")].to_dict("records")
    lines = ["| loss | what it is | as a function | outcome of training | verdict |", "|---|---|---|---|---|"]
    for row in sorted(shown, key=lambda row: (*ORDER, row["verdict"]).index(row["verdict"])):
        failed = f" ({row['failures']} seeds failed)" if row["failures"] != "0" else ""
        cells = (
            f"`{row['loss']}`",
            description_of(row["loss"]),
            row["objective"],
            row["outcome"] + failed,
            row["verdict"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def description_of(loss: str) -> str:
    """First sentence of the comment in the loss's own file, and its note where there is one."""
    text = (ROOT / "conf" / "loss" / f"{loss}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    sentence = re.split(r"\.(?: |$)", comment.removeprefix("Control. "))[0]
    return (sentence + NOTES.get(loss, "")).replace("|", "\\|")


def equivalence() -> str:
    """Table of `make equivalence` and the sentence below it."""
    printed = _printed("pipeline.train", "experiment=equivalence", "tracking=none")
    sentence = next(line for line in printed.splitlines() if line.startswith("nll: "))
    return _code(f"{cut(printed)}\n\n{textwrap.fill(sentence, WIDTH)}")


def audit() -> str:
    """Table of an audit. The figure of the same audit becomes the README's figure."""
    chosen = f"loss=[{','.join(FIGURE_LOSSES)}]"
    return _code(cut(_printed("pipeline.audit", chosen, "tracking=none", figure="p_minus_y.svg")))


BLOCKS: dict[str, Callable[[], str]] = {"verdicts": verdicts, "equivalence": equivalence, "audit": audit}


def _printed(module: str, *words: str, figure: str | None = None) -> str:
    """Standard output of a command. Copies one of its figures to `FIGURE` if a name is given."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", module, *words, f"hydra.run.dir={scratch}/run"]
        environment = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
        if figure:
            shutil.copy(Path(scratch, "run", "figures", figure), FIGURE)
    return done.stdout


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def cut(printed: str) -> str:
    """Table from a command's output, without its title."""
    lines = [line.rstrip() for line in printed.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("  loss "))
    end = next(i for i, line in enumerate(lines[first:], first) if not line)
    return "\n".join(lines[first:end])


def with_block(text: str, name: str, content: str) -> str:
    """Return the README's text with one block replaced.

    Raises:
        UsageError: the block's two marks are missing, repeated or in the wrong order.
    """
    begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UsageError(f"README.md needs {begin} and {end}, each once and in this order")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def write(names: Sequence[str]) -> int:
    """Write the named blocks of the README, or all of them."""
    for name in names:
        if name not in BLOCKS:
            raise UsageError(f"no block is called {name}{did_you_mean(name, BLOCKS)}; there is {', '.join(BLOCKS)}")
    text = README.read_text(encoding="utf-8")
    for name in names or BLOCKS:
        text = with_block(text, name, BLOCKS[name]())
    README.write_text(text, encoding="utf-8")
    print(f"wrote {', '.join(names or BLOCKS)} of {README}")
    return 0


if __name__ == "__main__":
    sys.exit(run_and_report(lambda: write(sys.argv[1:])))
