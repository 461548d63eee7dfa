"""Names of the runs of a trial: (arm, seed). An arm is a loss or a control. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

REPLAY, DOSE = "replay", "dose"
IN_FLOAT64, REORDERED = "placebo_float64", "placebo_reordered"
DITHERED, DITHERED_AGAIN = "placebo_dithered", "placebo_dithered_again"
NAMES = (REPLAY, IN_FLOAT64, REORDERED, DITHERED, DITHERED_AGAIN, DOSE)
BY_PRECISION = {"float32": (IN_FLOAT64, REORDERED), "bf16_mixed": (DITHERED, DITHERED_AGAIN), "float64": ()}
"""Placebos of each precision. In float64 none is needed, because the audit decides."""

RANKED = "rank_"  # prefix of arms that trials of earlier versions added; no loss may have it


def is_control(arm: str) -> bool:
    """Return True if the trial itself added the arm."""
    return arm in NAMES or arm.startswith(RANKED)


@dataclass(frozen=True)
class Replica:
    """One (arm, seed)."""

    arm: str
    seed: int
