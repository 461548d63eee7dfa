"""The names of what a trial trains: (arm, seed), and the arms that are controls. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REPLAY, DOSE = "replay", "dose"
IN_FLOAT64, REORDERED = "placebo_float64", "placebo_reordered"
DITHERED, DITHERED_AGAIN = "placebo_dithered", "placebo_dithered_again"
NAMES = (REPLAY, IN_FLOAT64, REORDERED, DITHERED, DITHERED_AGAIN, DOSE)
BY_PRECISION = {"float32": (IN_FLOAT64, REORDERED), "bf16_mixed": (DITHERED, DITHERED_AGAIN), "float64": ()}
"""The placebos of each precision; in float64 the audit decides, and none is needed."""


RANKED = "rank_"  # what the arms of the rank test begin with: no loss may
COPY, CANDIDATE = f"{RANKED}copy_", f"{RANKED}of_"


def is_control(arm: str) -> bool:
    """Whether an arm was added by the trial itself."""
    return arm in NAMES or arm.startswith(RANKED)


def ranked_arms(candidates: Sequence[str], copies: int) -> list[str]:
    """The arms of the rank test: dithered copies of the reference, and every candidate dithered alike."""
    return [f"{COPY}{k}" for k in range(1, copies + 1)] + [f"{CANDIDATE}{name}" for name in candidates]


@dataclass(frozen=True)
class Replica:
    """One (arm, seed)."""

    arm: str
    seed: int
