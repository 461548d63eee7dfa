"""Killed anywhere, the same command brings every run exactly once, with the weights that nothing interrupted.

A crash point is a write, a rename, a checkpoint or a statement to MLflow's database, see `watched`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.entry import ExitCode
from tests.faults.watched import KILLED, Drill


def test_killed_three_times_on_its_way_a_trial_ends_as_if_it_had_not_been(
    empty: Drill, whole: Drill, tmp_path: Path
) -> None:
    """Before a checkpoint is in place, in the middle of a tile's cells, and of the runs that MLflow is told of."""
    drill = empty.copied(tmp_path / "drill")
    points = ("rename trial/partial/.ID.pt-draft", 2), ("rename trial/cells/LOSS/.sN-draft", 5), ("sql COMMIT", 9)
    for moment in points:
        assert whole.crash_points()[moment[0]] >= 3
        assert drill.run(moment).code == KILLED
    assert drill.run().code == ExitCode.HOLDS
    drill.assert_whole(whole.hashes())


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_killed_at_any_crash_point(empty: Drill, whole: Drill, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number, (name, times) in enumerate(sorted(whole.crash_points().items())):
        drill = empty.copied(tmp_path / f"{number}")
        moment = name, int(draw.integers(1, times, endpoint=True))
        assert drill.run(moment).code == KILLED, moment
        assert drill.run().code == ExitCode.HOLDS, moment
        drill.assert_whole(whole.hashes())
        print(f"killed before {name}, {moment[1]} of {times}")


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_killed_30_times_at_uniform_moments_between_the_first_step_and_the_end(
    empty: Drill, whole: Drill, tmp_path: Path
) -> None:
    draw, killed = np.random.default_rng(0), 0
    seconds = empty.copied(tmp_path / "timed").run().seconds
    for number, moment in enumerate(draw.uniform(0, seconds, size=60)):
        drill = empty.copied(tmp_path / f"{number}")
        if drill.run(kill_after=moment).code != KILLED:  # it was faster, and had ended
            continue
        assert drill.run().code == ExitCode.HOLDS, moment
        drill.assert_whole(whole.hashes())
        print(f"killed {moment:.2f} s after the first step")
        killed += 1
        if killed == 30:
            return
    pytest.fail(f"only {killed} of 60 were killed before they ended")
