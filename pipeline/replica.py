"""Names of the runs of a trial: (arm, seed). An arm is a loss or a control. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REPLAY, DOSE = "replay", "dose"
IN_FLOAT64, REORDERED = "placebo_float64", "placebo_reordered"
DITHERED, DITHERED_AGAIN = "placebo_dithered", "placebo_dithered_again"
NAMES = (REPLAY, IN_FLOAT64, REORDERED, DITHERED, DITHERED_AGAIN, DOSE)
BY_PRECISION = {"float32": (IN_FLOAT64, REORDERED), "bf16_mixed": (DITHERED, DITHERED_AGAIN), "float64": ()}
"""Placebos of each precision. In float64 none is needed, because the audit decides."""

RANKED = "rank_"  # prefix of the arms of the rank test; no loss may have it
COPY, CANDIDATE = f"{RANKED}copy_", f"{RANKED}of_"


def is_control(arm: str) -> bool:
    """Return True if the trial itself added the arm."""
    return arm in NAMES or arm.startswith(RANKED)


def ranked_arms(candidates: Sequence[str], copies: int) -> list[str]:
    """Return the arms of the rank test: copies of the reference and all candidates, with random rounding."""
    return [f"{COPY}{k}" for k in range(1, copies + 1)] + [f"{CANDIDATE}{name}" for name in candidates]


@dataclass(frozen=True)
class Replica:
    """One (arm, seed)."""

    arm: str
    seed: int
