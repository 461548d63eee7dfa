from __future__ import annotations

import pytest

from pipeline.entry import ExitCode
from pipeline.tracking.tracker import Tracker
from tests.faults.drill import Drill


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """A database without runs. MLflow needs seconds to make one."""
    drill = Drill(tmp_path_factory.mktemp("empty"))
    Tracker(drill.uri, "likelihood-lab", drill.root).open()
    return drill


@pytest.fixture(scope="session")
def whole(empty: Drill, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """The trial that nothing interrupts."""
    drill = empty.copy(tmp_path_factory.mktemp("whole") / "drill")
    assert drill.run().code == ExitCode.HOLDS
    drill.assert_whole(drill.hashes)
    return drill
