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
from pipeline.entry import guarded, lasting

USAGE = (
    "usage: python -m pipeline.report DIR|sweep=ID "
    "[expect=same|{LOSS: WORD}] [about=objective|outcome] [reference=LOSS]"
)


def report(arguments: list[str]) -> int:
    """Conclude again; what is not given is as the trial was asked."""
    with lasting("torch"):
        from pipeline.config import schema as conf
        from pipeline.storage.cells import TrialFolder
        from pipeline.trial.conclude import conclude
        from pipeline.verdict.plan import read_request

    known = {"expect", "about", "reference", "sweep"}
    changes = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in known and "=" in a)
    folders = [a for a in arguments if a.partition("=")[0] not in known]
    if "sweep" in changes:
        folders.append(str(Path("outputs") / changes.pop("sweep")))
    if len(folders) != 1:
        raise UsageError(USAGE)
    folder = TrialFolder(Path(folders[0]))
    request, facts = read_request(folder.path)
    asked = {
        "loss": dict.fromkeys(request.losses),
        "reference": changes.get("reference", request.reference),
        "expect": _mapping(changes["expect"]) if "expect" in changes else dict(request.expect),
    }
    about = changes.get("about", request.about)
    if about not in conf.About.__members__:
        raise UsageError(f"about={about}; choose objective or outcome")
    request = replace(request, about=about, reference=conf.reference_of(asked), expect=conf.expectations_of(asked))
    with folder.locked(), folder.training(request.seeds):
        return conclude(folder, request, facts)[0]


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
    sys.exit(guarded(lambda: report(sys.argv[1:])))


if __name__ == "__main__":
    main()
