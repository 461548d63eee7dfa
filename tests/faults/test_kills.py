"""After a kill at any moment, the same command completes every run once, with the weights of an undisturbed trial.

A crash point is a write, a rename, a checkpoint or a statement to MLflow's database (see `drill`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.entry import ExitCode
from tests.faults.drill import KILLED, Drill


def test_killed_three_times_a_trial_ends_the_same(empty: Drill, whole: Drill, tmp_path: Path) -> None:
    """Killed before a checkpoint is in place, between two cells of a tile, and between two of MLflow's commits."""
    drill = empty.copy(tmp_path / "drill")
    points = ("rename trial/partial/.ID.pt-draft", 2), ("rename trial/cells/LOSS/.sN-draft", 5), ("sql COMMIT", 9)
    for moment in points:
        assert whole.crash_points()[moment[0]] >= 3
        assert drill.run(moment).code == KILLED
    assert drill.run().code == ExitCode.HOLDS
    drill.assert_whole(whole.hashes)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_killed_at_any_crash_point(empty: Drill, whole: Drill, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, (name, count) in enumerate(sorted(whole.crash_points().items())):
        drill = empty.copy(tmp_path / f"{number}")
        moment = name, int(rng.integers(1, count, endpoint=True))
        assert drill.run(moment).code == KILLED, moment
        assert drill.run().code == ExitCode.HOLDS, moment
        drill.assert_whole(whole.hashes)
        print(f"killed before {name}, {moment[1]} of {count}")


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_killed_30_times_at_uniform_moments(empty: Drill, whole: Drill, tmp_path: Path) -> None:
    """The moments lie between the first training step and the end."""
    rng, num_killed = np.random.default_rng(0), 0
    seconds = empty.copy(tmp_path / "timed").run().seconds
    for number, moment in enumerate(rng.uniform(0, seconds, size=60)):
        drill = empty.copy(tmp_path / f"{number}")
        if drill.run(kill_after=moment).code != KILLED:  # it had ended before
            continue
        assert drill.run().code == ExitCode.HOLDS, moment
        drill.assert_whole(whole.hashes)
        print(f"killed {moment:.2f} s after the first step")
        num_killed += 1
        if num_killed == 30:
            return
    pytest.fail(f"only {num_killed} of 60 were killed before they ended")
