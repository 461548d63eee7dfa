"""Entry point: the verdict again, from the cells of a trial's folder.

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
from pipeline.entry import gc_paused_import, run_and_report

USAGE = (
    "usage: python -m pipeline.report DIR|sweep=ID "
    "[expect=same|{LOSS: WORD}] [about=objective|outcome] [reference=LOSS]"
)


def report(arguments: list[str]) -> int:
    """Conclude again; what is not given is as the trial was asked."""
    with gc_paused_import("torch"):
        from pipeline.config import schema as conf
        from pipeline.storage.cells import TrialFolder
        from pipeline.trial.conclude import conclude
        from pipeline.verdict.plan import read_plan

    known = {"expect", "about", "reference", "sweep"}
    changes = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in known and "=" in a)
    folders = [a for a in arguments if a.partition("=")[0] not in known]
    if "sweep" in changes:
        folders.append(str(Path("outputs") / changes.pop("sweep")))
    if len(folders) != 1:
        raise UsageError(USAGE)
    folder = TrialFolder(Path(folders[0]))
    plan, context = read_plan(folder.path)
    asked = {
        "loss": dict.fromkeys(plan.losses),
        "reference": changes.get("reference", plan.reference),
        "expect": _mapping(changes["expect"]) if "expect" in changes else dict(plan.expect),
    }
    about = changes.get("about", plan.about)
    if about not in conf.About.__members__:
        raise UsageError(f"about={about}; choose objective or outcome")
    plan = replace(plan, about=about, reference=conf.reference_of(asked), expect=conf.expectations_of(asked))
    with folder.locked(), folder.training(plan.seeds):
        return conclude(folder, plan, context)[0]


def _mapping(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"expect={text} cannot be read; give same, or a mapping such as '{{nll: same}}'") from error


def main() -> None:
    """Console script."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        sys.exit(0)
    sys.exit(run_and_report(lambda: report(sys.argv[1:])))


if __name__ == "__main__":
    main()
