"""The wheel holds the library alone, and works in an empty folder with its dependencies alone."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
    command, environment = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_wheel_holds_the_library_alone(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"likelihood_lab"}
    assert (installed / "likelihood_lab" / "py.typed").is_file()


# --- the audit, where only torch, numpy, scipy and mpmath are installed

LAB = (
    "hydra", "lightning", "pytorch_lightning", "mlflow", "omegaconf", "pandas", "pyarrow", "rich", "pydantic", "psutil",
    "matplotlib", "sklearn", "torchvision", "yaml",
)  # fmt: skip

BLOCKED = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LAB}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

AUDIT = """
from likelihood_lab import assert_same_loss, capture, check
import likelihood_lab
import torch, torch.nn.functional as F

assert likelihood_lab.__file__.startswith(SITE), likelihood_lab.__file__
found = check(F.cross_entropy, num_classes=(2,))
print(found.show())
net = torch.nn.Linear(3, 2)
with capture(net) as batches:
    F.cross_entropy(net(torch.rand(4, 3)), torch.tensor([0, 1, 1, 0]))
assert_same_loss(lambda h, w, b, y: F.cross_entropy(F.linear(h, w, b), y),
                 args=("hidden", "weight", "bias", "labels"), num_classes=(2,), batches=batches)
try:
    assert_same_loss(lambda z, y: 2 * F.cross_entropy(z, y), num_classes=(2,))
except AssertionError as error:
    print(error)
"""

OWN_TESTS = """
import sys

def test_plugin_does_not_import_torch():
    assert "torch" not in sys.modules

def test_right(assert_same_loss):
    import torch.nn.functional as F
    assert_same_loss(lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), num_classes=(2, 10))

def test_wrong(assert_same_loss):
    import torch.nn.functional as F
    assert_same_loss(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), num_classes=(2, 10))
"""


def test_audit_runs_without_the_packages_of_the_pipeline(installed: Path, tmp_path: Path) -> None:
    """The import of hydra at the end shows that those packages are blocked."""
    script = f"{BLOCKED}\nSITE = {str(installed)!r}\n{AUDIT}\nimport hydra.utils"
    done = run(installed, tmp_path, "-c", script)
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'hydra'\n")
    assert done.stdout.startswith("identical: ")
    assert "would have caught" in done.stdout
    assert "scaled: k = 2 in every batch" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_no_module_imports_the_packages_of_the_pipeline(installed: Path, tmp_path: Path) -> None:
    """The package itself imports torch only when it is used."""
    load = f"""
import importlib, pkgutil, sys, likelihood_lab
assert "torch" not in sys.modules
names = [m.name for m in pkgutil.walk_packages(likelihood_lab.__path__, "likelihood_lab.") if "__main__" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names), sorted({set(LAB)} & set(sys.modules)))
"""
    done = run(installed, tmp_path, "-c", load)
    assert done.returncode == 0, done.stderr
    count, found = done.stdout.split(maxsplit=1)
    assert int(count) > 25
    assert found.strip() == "[]"


def test_plugin_fixture_passes_and_fails(installed: Path, tmp_path: Path) -> None:
    (dist_info,) = installed.glob("*.dist-info")
    entry_points = configparser.ConfigParser()
    entry_points.read(dist_info / "entry_points.txt")
    assert dict(entry_points["pytest11"]) == {"likelihood_lab": "likelihood_lab.pytest_plugin"}
    (tmp_path / "test_mine.py").write_text(OWN_TESTS)
    done = run(installed, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "AssertionError: different: not parallel to the reference" in done.stdout
    assert "print(torch.autograd.grad(mine(z, labels), z)" in done.stdout


def test_command_finds_a_loss_of_the_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch.nn.functional import cross_entropy as ce\n")
    command = "import runpy, sys; sys.argv = ['likelihood_lab', 'check', 'mine:ce', '--num-classes', '2', '--json']"
    script = f"{BLOCKED}\n{command}; runpy.run_module('likelihood_lab', run_name='__main__')"
    done = run(installed, tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["same"] is True
