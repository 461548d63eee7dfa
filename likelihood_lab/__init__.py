"""Library that tests whether two losses are the same function and train the same model.

    from likelihood_lab import assert_same_loss
    assert_same_loss(my_cross_entropy, torch.nn.functional.cross_entropy)

Command line: `python -m likelihood_lab check my_losses:my_cross_entropy`. Each name is imported on first use, so that
`import likelihood_lab` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from likelihood_lab.audit.api import assert_same_loss, capture, check
    from likelihood_lab.audit.finding import Finding
    from likelihood_lab.categorical import losses
    from likelihood_lab.stats.equivalence import tost
    from likelihood_lab.stats.outcome import compare

__all__ = ["Finding", "assert_same_loss", "capture", "check", "compare", "losses", "tost"]

_HOMES = {
    "Finding": "audit.finding",
    "assert_same_loss": "audit.api",
    "capture": "audit.capture",
    "check": "audit.api",
    "compare": "stats.outcome",
    "losses": "categorical.losses",
    "tost": "stats.equivalence",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"likelihood_lab has no {name!r}; it has {', '.join(__all__)}")
    home = importlib.import_module(f"likelihood_lab.{_HOMES[name]}")
    return home if name == "losses" else getattr(home, name)
