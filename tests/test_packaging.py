"""The wheel works in an empty folder, with its configuration, its sweeper and its template inside."""

from __future__ import annotations

import configparser
import os
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
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_configuration_template_and_sweeper_and_no_stray_package(installed: Path) -> None:
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert {
        "pipeline/conf/train.yaml", "pipeline/conf/loss/nll.yaml", "pipeline/report.html.j2", "pipeline/py.typed",
        "hydra_plugins/stacked_sweeper/stacked_sweeper.py",
    } <= files  # fmt: skip
    assert "hydra_plugins/__init__.py" not in files
    top = {file.partition("/")[0] for file in files}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "pipeline",
        "hydra_plugins",
        "likelihood_lab.py",
    }


def test_a_sweep_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(
        installed, tmp_path, "-m", "pipeline.train", "-m", "loss=nll,ce", "seed=range(2)",
        "model=softmax_regression", "epochs=1", "tracking=none", "expect=same",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 1 expectations hold" in done.stdout
    (folder,) = (tmp_path / "outputs").glob("digits-softmax_regression-*")
    assert (folder / "verdict.json").is_file()
    assert len(list(folder.glob("cells/*/*/state.pt"))) == 4


# --- the audit, where nothing but torch, numpy, scipy and mpmath is installed

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
import likelihood_lab, pipeline.check
import torch, torch.nn.functional as F

for module in (likelihood_lab, pipeline.check):
    assert module.__file__.startswith(SITE), module.__file__
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

def test_nothing_is_imported_before_it_is_asked_for():
    assert "torch" not in sys.modules

def test_right(assert_same_loss):
    import torch.nn.functional as F
    assert_same_loss(lambda z, y: F.nll_loss(F.log_softmax(z, 1), y), num_classes=(2, 10))

def test_wrong(assert_same_loss):
    import torch.nn.functional as F
    assert_same_loss(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), num_classes=(2, 10))
"""


def test_the_audit_runs_from_the_wheel_without_the_laboratorys_packages(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-c", f"{BLOCKED}\nSITE = {str(installed)!r}\n{AUDIT}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: ")
    assert "would have caught" in done.stdout
    assert "scaled: k = 2 in every batch" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_laboratorys_packages_are_blocked_where_they_are_said_to_be(installed: Path, tmp_path: Path) -> None:
    for name in ("pipeline.train", "hydra.utils"):
        done = run(installed, tmp_path, "-c", f"{BLOCKED}\nimport {name}")
        assert done.returncode != 0


def test_no_module_of_the_audit_imports_the_laboratorys_packages(installed: Path, tmp_path: Path) -> None:
    modules = "import pkgutil, sys, pipeline.check, pipeline.numerics, pipeline.pytest_plugin, pipeline.auditing as a"
    load = (
        "names = [m.name for m in pkgutil.iter_modules(a.__path__)]; [__import__(f'{a.__name__}.{n}') for n in names]"
    )
    done = run(
        installed, tmp_path, "-c", f"{modules}; {load}; print(len(names), sorted({set(LAB)} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    count, found = done.stdout.split(maxsplit=1)
    assert int(count) > 10
    assert found.strip() == "[]"


def test_the_shim_imports_torch_only_when_it_is_used(installed: Path, tmp_path: Path) -> None:
    look = "import sys, likelihood_lab; sys.exit('torch' in sys.modules)"
    assert run(installed, tmp_path, "-c", look).returncode == 0


def test_the_fixture_of_the_pytest_plugin_passes_and_fails_as_it_should(installed: Path, tmp_path: Path) -> None:
    (dist_info,) = installed.glob("*.dist-info")
    entry_points = configparser.ConfigParser()
    entry_points.read(dist_info / "entry_points.txt")
    assert dict(entry_points["pytest11"]) == {"likelihood_lab": "pipeline.pytest_plugin"}
    (tmp_path / "test_mine.py").write_text(OWN_TESTS)
    done = run(installed, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "AssertionError: different: not parallel to the reference" in done.stdout
    assert "print(torch.autograd.grad(mine(z, labels), z)" in done.stdout
