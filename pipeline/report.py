"""Entry point: compute the verdict again from the runs in a trial's folder.

python -m pipeline.report outputs/digits-mlp-1f2e3d4c [expect=same] [about=outcome] [reference=ce]
python -m pipeline.report sweep=digits-mlp-1f2e3d4c
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from likelihood_lab.errors import UsageError
from pipeline.entry import OneLineParser, gc_paused_import, run_and_report

SETTINGS = ("sweep=", "expect=", "about=", "reference=")


def parse(arguments: list[str]) -> tuple[Path, dict[str, str]]:
    """Return the trial's folder and the settings that replace the trial's own."""
    parser = OneLineParser(
        prog="python -m pipeline.report",
        usage="%(prog)s DIR|sweep=ID [expect=same|{LOSS: WORD}] [about=objective|outcome] [reference=LOSS]",
        description="Compute the verdict again from the runs in a trial's folder. Absent settings are the trial's own.",
    )
    parser.add_argument("words", nargs="+", metavar="DIR", help="the trial's folder; then settings as KEY=VALUE")
    words = parser.parse_args(arguments).words
    settings = dict(word.split("=", 1) for word in words if word.startswith(SETTINGS))
    folders = [Path(word) for word in words if not word.startswith(SETTINGS)]
    if "sweep" in settings:
        folders.append(Path("outputs") / settings.pop("sweep"))
    if len(folders) != 1:
        parser.error(f"give one folder of a trial; found {', '.join(map(str, folders)) or 'none'}")
    return folders[0], settings


def report(arguments: list[str]) -> int:
    """Compute the verdict again and return its exit code."""
    path, settings = parse(arguments)
    with gc_paused_import("torch"):
        from pipeline.config import schema as conf
        from pipeline.storage.cells import TrialFolder
        from pipeline.trial.conclude import conclude
        from pipeline.verdict.plan import read_plan

    folder = TrialFolder(path)
    plan, context = read_plan(folder.path)
    about = settings.get("about", plan.about)
    if about not in conf.About.__members__:
        raise UsageError(f"about={about}; choose objective or outcome")
    config = {
        "loss": dict.fromkeys(plan.losses),
        "reference": settings.get("reference", plan.reference),
        "expect": _mapping(settings["expect"]) if "expect" in settings else dict(plan.expect),
    }
    plan = replace(plan, about=about, reference=conf.reference_of(config), expect=conf.expectations_of(config))
    with folder.locked(), folder.training(plan.seeds):
        return conclude(folder, plan, context)[0]


def _mapping(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"expect={text} cannot be read; give same, or a mapping such as '{{nll: same}}'") from error


def main() -> None:
    """Console script."""
    sys.exit(run_and_report(lambda: report(sys.argv[1:])))


if __name__ == "__main__":
    main()
