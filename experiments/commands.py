"""Commands and block of results in the README of a recorded experiment.

A command follows `$ ` in a console block; a backslash at the end continues a line. The recorder runs commands of the
form below, which train one trial into a folder of the experiment. It lists all others without running them.

    $ python -m pipeline.train experiment=SLUG ... hydra.run.dir=outputs/SLUG/TRIAL
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from likelihood_lab.errors import UsageError

TRAIN = ["python", "-m", "pipeline.train"]
FOLDER = "hydra.run.dir="
BEGIN, END = "<!-- recorded: begin -->", "<!-- recorded: end -->"
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"^<!-- figure: (\S+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """Training command of a README: its trial, and the words after `python -m pipeline.train`."""

    trial: str
    words: tuple[str, ...]

    def into(self, folder: Path) -> Command:
        """Return the same command for another folder, without tracking."""
        kept = [word for word in self.words if not word.startswith((FOLDER, "tracking="))]
        return Command(self.trial, (*kept, "tracking=none", f"{FOLDER}{folder}"))


@dataclass(frozen=True)
class Readme:
    """Content of experiments/<slug>/README.md that the recorder uses.

    Attributes:
        others: lines of the commands that the recorder does not run.
        figure: figure of the README as TRIAL/NAME.svg; None if the README does not name one.
    """

    path: Path
    commands: tuple[Command, ...]
    others: tuple[str, ...]
    figure: str | None = None

    @property
    def slug(self) -> str:
        """Name of the experiment and of its folder."""
        return self.path.parent.name


def read(path: Path) -> Readme:
    """Read the commands of a README.

    Raises:
        UsageError: a command cannot be read, or two write into one folder.
    """
    text, slug = path.read_text(encoding="utf-8"), path.parent.name
    commands: list[Command] = []
    others: list[str] = []
    for line in _prompted(text):
        command = _command(line, slug, path)
        if command is None:
            others.append(line)
        elif command.trial in (known.trial for known in commands):
            raise UsageError(
                f"{path}: two commands train into outputs/{slug}/{command.trial}; give each its own folder"
            )
        else:
            commands.append(command)
    figure = FIGURE.search(text)
    return Readme(path, tuple(commands), tuple(others), figure[1] if figure else None)


def _prompted(text: str) -> Iterator[str]:
    """Yield the commands of all console blocks, each on one line, without their output."""
    for block in CONSOLE.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if line.startswith("$ "):
                yield line.removeprefix("$ ").strip()


def _command(line: str, slug: str, path: Path) -> Command | None:
    """Return the command if the recorder can run it, otherwise None."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise UsageError(f"{path}: the command `{line}` cannot be read ({error})") from error
    folders = [word.removeprefix(FOLDER) for word in words if word.startswith(FOLDER)]
    if words[: len(TRAIN)] != TRAIN or not folders:
        return None
    trial = re.fullmatch(rf"outputs/{slug}/(\w+)", folders[-1])
    if trial is None:
        raise UsageError(f"{path}: `{FOLDER}{folders[-1]}` should read {FOLDER}outputs/{slug}/TRIAL")
    return Command(trial[1], tuple(words[len(TRAIN) :]))


def with_block(text: str, lines: Sequence[str]) -> str:
    """Return the README's text with new lines between its two marks.

    Raises:
        ValueError: the two marks are missing, repeated or in the wrong order.
    """
    parts = re.split(f"({re.escape(BEGIN)}|{re.escape(END)})", text)
    if parts[1::2] != [BEGIN, END]:
        raise ValueError(f"a README needs the lines {BEGIN} and {END} once each, in this order")
    before, _, _, _, after = parts
    return "".join([before, BEGIN, "\n", *(f"{line}\n" for line in lines), END, after])
