"""A full disk gives one line of error; with room again, the same command completes the trial."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.entry import ExitCode
from tests.faults.drill import Drill, Moment
from tests.trials import small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "24m") as place:  # the trial takes less than half of it
        yield place


def fill(disk: Path) -> None:
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def check_full_disk(drill: Drill, moment: Moment, disk: Path, hashes: dict[str, str]) -> str:
    """Fill the disk at that moment, make room, run again; return the errors of the first run."""
    ended = drill.run(moment, lambda: fill(disk))
    assert (disk / "filler").exists(), moment
    (disk / "filler").unlink()
    assert "Traceback" not in ended.errors, (moment, ended.errors)
    assert ended.code in (ExitCode.USAGE, ExitCode.HOLDS), (moment, ended)
    if ended.code == ExitCode.USAGE:
        (line,) = ended.errors.strip().splitlines()
        assert line.startswith("error: "), moment
    assert drill.run().code == ExitCode.HOLDS, moment
    drill.assert_whole(hashes)
    return ended.errors


def test_disk_full_while_cells_are_written(empty: Drill, whole: Drill, disk: Path) -> None:
    moment = "open trial/cells/LOSS/.sN-draft/state.pt", 5
    errors = check_full_disk(empty.copy(disk / "drill"), moment, disk, whole.hashes)
    assert "No space left on device; free space or choose another folder" in errors


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_disk_full_at_any_crash_point(empty: Drill, whole: Drill, disk: Path) -> None:
    for number, name in enumerate(sorted(whole.crash_points())):
        drill = empty.copy(disk / f"{number}")
        errors = check_full_disk(drill, (name, 1), disk, whole.hashes)
        print(f"full before {name}: {errors.strip()}")
        shutil.rmtree(drill.root)
