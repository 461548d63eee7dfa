"""A disk that is full at some stage costs a line, and after room is made the same command ends right."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.entry import ExitCode
from tests.faults.watched import Drill, Moment

SIZE = "24m"  # the trial takes less than half of it


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], check=False)  # noqa: S607
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here: run as root")
    yield place
    subprocess.run(["umount", place], check=True)  # noqa: S607


def fill(disk: Path) -> None:
    with (disk / "filler").open("ab", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def assert_survives(drill: Drill, moment: Moment, disk: Path, hashes: dict[str, str]) -> str:
    """Filled at that moment, then with room again; returns what the user was told."""
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


def test_full_while_cells_are_written(empty: Drill, whole: Drill, small_disk: Path) -> None:
    drill = empty.copied(small_disk / "drill")
    moment = "open trial/cells/LOSS/.sN-draft/state.pt", 5
    said = assert_survives(drill, moment, small_disk, whole.hashes())
    assert "No space left on device; free space or choose another folder" in said


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_full_at_any_crash_point(empty: Drill, whole: Drill, small_disk: Path) -> None:
    for number, name in enumerate(sorted(whole.crash_points())):
        drill = empty.copied(small_disk / f"{number}")
        said = assert_survives(drill, (name, 1), small_disk, whole.hashes())
        print(f"full before {name}: {said.strip()}")
        drill.remove()
