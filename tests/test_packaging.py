"""The wheel works in an empty folder, with its configuration, its sweeper and its template inside."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked as an installer would."""
    dist = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "pipeline.train", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_configuration_template_and_sweeper_and_no_stray_package(installed: Path) -> None:
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {
        "pipeline/conf/train.yaml", "pipeline/conf/loss/nll.yaml", "pipeline/report.html.j2", "pipeline/py.typed",
        "hydra_plugins/stacked_sweeper/stacked_sweeper.py",
    } <= files  # fmt: skip
    assert "hydra_plugins/__init__.py" not in files
    top = {file.partition("/")[0] for file in files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pipeline", "hydra_plugins"}


def test_a_sweep_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(
        installed, tmp_path, "-m", "loss=nll,ce", "seed=range(2)", "model=softmax_regression", "epochs=1",
        "tracking=none", "expect=same",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 1 expectations hold" in done.stdout
    (folder,) = (tmp_path / "outputs").glob("digits-softmax_regression-*")
    assert (folder / "verdict.json").is_file()
    assert len(list(folder.glob("cells/*/*/state.pt"))) == 4
