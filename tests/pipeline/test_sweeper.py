"""The sweeper: the jobs that it hands to a launcher, their overrides, and the contents of `sweep.json`."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.stacked_sweeper.stacked_sweeper import StackedSweeper
from likelihood_lab.errors import UsageError
from pipeline import entry
from pipeline.config.hydra_glue import DEFAULTS_LIST
from tests.trials import ROOT, usage_error

APP = ROOT / "tests" / "pipeline" / "sweeper_app"
CHECK = "hydra.sweeper.check=miniature.check"
Sweep = Callable[..., list[dict[str, Any]]]
Plan = Callable[..., list[list[str]]]


class FakeLauncher(Launcher):
    """Launcher that records its jobs and returns `exit_code` for each, or raises `accident`."""

    def __init__(self) -> None:
        self.batches: list[list[list[str]]] = []
        self.accident: BaseException | None = None
        self.exit_code = 0

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        raise AssertionError("the sweeper under test receives its launcher ready")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert initial_job_idx == sum(map(len, self.batches))
        self.batches.append([list(overrides) for overrides in job_overrides])
        if self.accident is not None:
            raise self.accident
        hydra = OmegaConf.create({"hydra": {"runtime": {"output_dir": "somewhere"}}})
        done = JobReturn(hydra_cfg=hydra, status=JobStatus.COMPLETED)
        done.return_value = {"exit_code": self.exit_code, "summary": "as told"}
        return [done for _ in job_overrides]


def jobs() -> list[dict[str, Any]]:
    """Return the jobs in the sweep.json of the working directory."""
    return list(json.loads(Path("sweep/sweep.json").read_text())["jobs"])


def received(job: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration that a job received."""
    return dict(json.loads(Path(job["dir"], "received.json").read_text()))


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes that the sweeper records."""
    codes: list[int] = []
    monkeypatch.setattr(entry, "record_exit_code", codes.append)
    return codes


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_codes: list[int]) -> Sweep:
    """Return a function that runs the miniature application and gives the jobs of its sweep.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(APP)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    import miniature  # type: ignore[import-not-found, unused-ignore]

    def run(*arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["miniature.py", *arguments, CHECK])
        miniature.main()
        return jobs()

    return run


@pytest.fixture(scope="module")
def master() -> tuple[HydraContext, DictConfig]:
    """Context and configuration that Hydra gives a sweeper of the miniature application."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APP)
        import miniature  # type: ignore[import-not-found, unused-ignore]  # noqa: F401  (registers its schema)

        with initialize_config_dir(str(APP / "conf"), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            one_folder = "hydra.sweep.subdir=${hydra:runtime.choices.model}"  # for all jobs that share a trial
            config = compose("config", overrides=[CHECK, one_folder], return_hydra_config=True)
    return HydraContext(config_loader=loader, callbacks=Callbacks()), config


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
def plan(
    master: tuple[HydraContext, DictConfig],
    launcher: FakeLauncher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exit_codes: list[int],
) -> Plan:
    """Return a function that gives the overrides of every job that the sweeper hands to its launcher."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **settings: object) -> list[list[str]]:
        sweeper = StackedSweeper(**{"check": "miniature.check", **settings})
        sweeper.hydra_context, sweeper.config = master
        sweeper.launcher = launcher
        sweeper.sweep(list(arguments))
        return [job for batch in launcher.batches for job in batch]

    return run


def run_subprocess(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run the miniature application in a subprocess, for launchers that start workers."""
    path = os.pathsep.join([str(ROOT), str(APP), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "miniature", *arguments, CHECK],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
    )
    return list(json.loads((folder / "sweep" / "sweep.json").read_text())["jobs"])


def test_swept_losses_and_seeds_share_a_job(sweep: Sweep, tmp_path: Path) -> None:
    """Every other sweep makes jobs, and only sweep.json is written beside them."""
    found = sweep("-m", "model=mlp,cnn", "loss=nll,ce", "seed=range(3)", "loss.nll.weight=2")
    assert [job["overrides"] for job in found] == [
        ["model=mlp", "loss=[nll,ce]", "seed=[0,1,2]", "loss.nll.weight=2"],
        ["model=cnn", "loss=[nll,ce]", "seed=[0,1,2]", "loss.nll.weight=2"],
    ]
    assert [received(job)["model"]["hidden"] for job in found] == [8, 4]
    assert [received(job)["loss"] for job in found] == [{"nll": {"weight": 2.0}, "ce": {"weight": 1.0}}] * 2
    assert [received(job)["seed"] for job in found] == [[0, 1, 2]] * 2
    assert sorted(path.name for path in tmp_path.glob("sweep/*")) == ["0", "1", "sweep.json"]
    assert list(found[0]) == ["overrides", "dir", "status", "exit_code", "error"]
    assert found[0]["dir"] == str(tmp_path / "sweep" / "0")


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [
        ([], {}, [[]]),
        (["seed=range(0,10,3)"], {}, [["seed=[0,3,6,9]"]]),
        (["seed=choice(5,2)"], {}, [["seed=[5,2]"]]),
        (["++seed=0,1"], {}, [["++seed=[0,1]"]]),
        (["seed=3"], {}, [["seed=3"]]),
        (["seed=[4,5]"], {}, [["seed=[4,5]"]]),
        (["loss=glob(*)"], {}, [["loss=[ce,kl,nll]"]]),
        (["loss=glob(*,exclude=nll)"], {}, [["loss=[ce,kl]"]]),
        (
            ["loss=[nll,ce],kl", "seed=[0],[1,2]"],  # lists make an ordinary sweep
            {},
            [
                ["loss=[nll,ce]", "seed=[0]"],
                ["loss=[nll,ce]", "seed=[1,2]"],
                ["loss=kl", "seed=[0]"],
                ["loss=kl", "seed=[1,2]"],
            ],
        ),
        (["loss=nll,ce", "seed=0,1"], {"stack": ["seed"]}, [["loss=nll", "seed=[0,1]"], ["loss=ce", "seed=[0,1]"]]),
        (
            ["model=mlp,cnn,mlp", "model.hidden=2,2"],  # equal jobs are one job
            {},
            [["model=mlp", "model.hidden=2"], ["model=cnn", "model.hidden=2"]],
        ),
        (["seed=0,1", "++seed=7,8", "epochs=1,2", "epochs=5"], {}, [["++seed=[7,8]", "epochs=5"]]),
        (["model=cnn"], {"params": {"seed": "range(3)", "model": "mlp,cnn"}}, [["seed=[0,1,2]", "model=cnn"]]),
        (["seed=0,1"], {"replicas_per_job": 6}, [["seed=[0,1]"]]),
        (["seed=0,1", "share=[1]"], {"replicas_per_job": 1}, [["seed=[0,1]", "share=[1]"]]),
    ],
)
def test_the_overrides_of_the_jobs(
    plan: Plan, arguments: list[str], settings: dict[str, Any], expected: list[list[str]]
) -> None:
    assert plan(*arguments, **settings) == expected


@pytest.mark.parametrize(
    ("arguments", "limit", "jobs", "shares"),
    [
        (
            ["model=mlp,cnn", "loss=nll,ce", "seed=range(5)"],
            5,
            [[f"model={model}", "loss=[nll,ce]", "seed=[0,1,2,3,4]"] for model in ("mlp", "cnn")],
            ["share=[0,1]", "share=[2,3]", "share=[4]"],
        ),
        (["++seed=3,1,2"], 7, [["++seed=[3,1,2]"]], ["share=[3,1]", "share=[2]"]),  # three losses by default
        (["seed=0,1"], 1, [["seed=[0,1]"]], ["share=[0]", "share=[1]"]),  # a seed's losses exceed the limit
    ],
    ids=["two jobs", "default losses", "too low a limit"],
)
def test_large_jobs_are_shared_and_one_job_concludes(
    plan: Plan, arguments: list[str], limit: int, jobs: list[list[str]], shares: list[str]
) -> None:
    answer = plan(*arguments, replicas_per_job=limit)
    assert answer == [[*job, share] for job in jobs for share in shares] + [[*job, "share=[]"] for job in jobs]


def test_a_shuffled_range_is_complete(plan: Plan) -> None:
    ((seeds,),) = plan("seed=shuffle(range(20))")
    assert sorted(json.loads(seeds.removeprefix("seed="))) == list(range(20))


def test_overrides_arrive_as_written(sweep: Sweep) -> None:
    jobs = sweep("-m", "note='a,b','c=d'", "~experiment")
    assert [received(job)["note"] for job in jobs] == ["a,b", "c=d"]


def test_the_basic_sweeper_makes_a_job_of_every_combination(
    tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["miniature.py", "-m", "hydra/sweeper=basic", "loss=nll,ce", "seed=0,1"])
    sys.modules["miniature"].main()
    assert len(list(tmp_path.glob("sweep/*/received.json"))) == 4


def test_an_experiment_declares_its_own_sweep(sweep: Sweep) -> None:
    (job,) = sweep("experiment=paired", "model=cnn")
    assert job["overrides"] == ["loss=[nll,ce]", "seed=[0,1,2]", "model=cnn", "experiment=paired"]
    assert received(job)["option"] == "cnn"


def test_the_last_job_follows_all_batches_of_shares(plan: Plan, launcher: FakeLauncher) -> None:
    plan("seed=0,1,2", replicas_per_job=3, max_batch_size=2)
    assert [[job[-1] for job in batch] for batch in launcher.batches] == [
        ["share=[0]", "share=[1]"],
        ["share=[2]"],
        ["share=[]"],
    ]


@pytest.mark.parametrize(
    ("exit_code", "accident", "num_jobs"), [(3, None, 3), (2, None, 2), (3, ConnectionError("the cluster is gone"), 3)]
)
def test_the_last_job_follows_lost_but_not_refused_shares(
    plan: Plan, launcher: FakeLauncher, exit_codes: list[int], exit_code: int, accident: Exception | None, num_jobs: int
) -> None:
    launcher.exit_code, launcher.accident = exit_code, accident
    assert len(plan("seed=0,1", replicas_per_job=3)) == num_jobs
    assert exit_codes == [exit_code] * num_jobs


def test_jobs_that_share_a_trial_need_one_folder(sweep: Sweep) -> None:
    with pytest.raises(UsageError, match=r"hydra\.sweep\.subdir gives .* several folders \(0, 1\)"):
        sweep("-m", "seed=0,1", "hydra.sweeper.replicas_per_job=3")
    assert not Path("sweep").exists()


def test_a_failed_job_does_not_affect_the_others(
    sweep: Sweep, exit_codes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = sweep("-m", "exit_code=0,1,2", "accident=raise,null")
    assert [(job["status"], job["exit_code"], job["error"]) for job in answer] == [
        ("failed", 3, "RuntimeError: the bench is on fire"),
        ("done", 0, None),
        ("failed", 3, "RuntimeError: the bench is on fire"),
        ("done", 1, None),
        ("failed", 3, "RuntimeError: the bench is on fire"),
        ("failed", 2, "ended with 2"),
    ]
    assert exit_codes == [3, 0, 3, 1, 3, 2]
    summary = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(summary) == 4
    assert summary[-1] == "failed: exit_code=2 accident=null: ended with 2"


def test_the_jobs_of_an_interrupted_sweep_are_unknown(plan: Plan, launcher: FakeLauncher) -> None:
    launcher.accident = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        plan("epochs=3,4")
    assert [(job["overrides"], job["status"]) for job in jobs()] == [
        (["epochs=3"], "unknown"),
        (["epochs=4"], "unknown"),
    ]


def test_a_launcher_s_failure_does_not_stop_later_batches(
    plan: Plan, launcher: FakeLauncher, exit_codes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.accident = ConnectionError("the cluster\nis gone")
    plan("epochs=1,2,3", max_batch_size=2)
    assert launcher.batches == [[["epochs=1"], ["epochs=2"]], [["epochs=3"]]]
    assert {(job["status"], job["exit_code"]) for job in jobs()} == {("unknown", None)}
    assert exit_codes == [3, 3, 3]
    assert "unknown: epochs=3: ConnectionError: the cluster is gone\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["loss=nll,kll"], "loss=kll: no such option; there is ce, kl, nll"),
        (["loss=[nll,kll]"], "loss=kll: no such option; there is ce, kl, nll"),
        (["model=mlp,transformer"], "model=transformer: no such option; there is cnn, mlp"),
        (["losss=nll,ce"], "unknown key 'losss' (did you mean 'loss'?); the keys are: "),
        (["epochs=1,two"], "epochs: Value 'two' of type 'str' could not be converted to Integer"),
        (["seed=0,-1"], "seed=[0, -1]: give integers >= 0"),
        (["epochs=1,2", "seed=0,x"], "seed=[0, 'x']: give integers >= 0"),
        (["seed=0,1,0"], "seed=0,1,0 repeats 0: name each value once"),
        (["loss=nll,nll"], "loss=nll,nll repeats nll: name each value once"),
        (["+loss=kl"], "+loss=kl: loss cannot be added to; name every value in loss=VALUE,VALUE"),
        (["seed=range(3,1)"], "seed=range(3,1) stands for no value at all"),
        (["model=glob(z*)"], "model=glob(z*) stands for no value at all"),
        (["seed=range(0,5,0)"], "seed=range(0,5,0): "),
        (["epochs=interval(0,1)"], "an interval cannot be listed"),
        (["note=a=b"], "mismatched input '='"),
        (["experiment=long,paired"], "experiment=paired brings its own hydra.sweeper settings: run it by"),
    ],
)
def test_a_wrong_request_is_refused_before_any_job(
    plan: Plan, launcher: FakeLauncher, exit_codes: list[int], arguments: list[str], line: str
) -> None:
    assert line in usage_error(lambda: plan(*arguments))
    assert (launcher.batches, exit_codes, Path("sweep").exists()) == ([], [], False)


@pytest.mark.parametrize("setting", ["max_batch_size", "replicas_per_job"])
def test_a_limit_below_one_is_refused(plan: Plan, setting: str) -> None:
    with pytest.raises(UsageError, match=f"hydra.sweeper.{setting}=0: give an integer >= 1"):
        plan(**{setting: 0})


def test_options_of_a_user_s_folder_are_listed(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "focal.yaml").write_text("focal: {weight: 1.0}\n")
    with pytest.raises(UsageError, match="loss=fokal: no such option; there is ce, focal, kl, nll"):
        sweep("-m", "loss=focal,fokal", f"hydra.searchpath=[file://{tmp_path}/mine]")


def test_a_folder_that_cannot_be_written_is_refused(plan: Plan, launcher: FakeLauncher) -> None:
    Path("sweep").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"cannot write to sweep: .*; free space or choose another folder"):
        plan()
    assert launcher.batches == []


def test_a_killed_joblib_worker_affects_its_batch_alone(tmp_path: Path) -> None:
    answer = run_subprocess(
        tmp_path, "-m", "accident=die,null", "model=mlp,cnn", "seed=0,1", "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2", "hydra.sweeper.max_batch_size=2",
    )  # fmt: skip
    assert [job["status"] for job in answer] == ["unknown", "unknown", "done", "done"]
    assert all(job["error"].startswith("TerminatedWorkerError: ") for job in answer[:2])
    assert [received(job)["seed"] for job in answer[2:]] == [[0, 1]] * 2


@pytest.mark.slow
def test_submitit_local_runs_the_same_jobs(tmp_path: Path) -> None:
    arguments = ["model=mlp,cnn", "loss=nll,ce", "seed=0,1", "hydra/launcher=submitit_local"]
    answer = run_subprocess(tmp_path, "-m", *arguments)
    assert [job["status"] for job in answer] == ["done", "done"]
    assert [received(job)["option"] for job in answer] == ["mlp", "cnn"]
    assert [received(job)["seed"] for job in answer] == [[0, 1]] * 2


INSIDE_HYDRA = ("hydra._internal", "hydra.core")


def test_imports_from_inside_hydra_are_listed() -> None:
    """Hydra 1.4 may move these names and `hydra_glue.DEFAULTS_LIST`; the project uses no other."""
    taken = set()
    for folder in ("pipeline", "hydra_plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith(INSIDE_HYDRA):
                    taken |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert taken == {
        "hydra.core.config_store.ConfigStore", "hydra.core.global_hydra.GlobalHydra",
        "hydra.core.hydra_config.HydraConfig", "hydra.core.plugins.Plugins", "hydra.core.utils.JobReturn",
        "hydra.core.override_parser.overrides_parser.OverridesParser",
        "hydra.core.override_parser.types.Override", "hydra.core.override_parser.types.Transformer",
    }  # fmt: skip
    assert importlib.util.find_spec(DEFAULTS_LIST) is not None
