"""The sweeper: which jobs it hands to a launcher, what they receive, and what `sweep.json` says of them."""

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
from pipeline import entry as exit_codes
from pipeline.config.hydra_glue import DEFAULTS_LIST

ROOT = Path(__file__).parents[2]
APP = ROOT / "tests" / "pipeline" / "sweeper_app"
CHECK = "hydra.sweeper.check=miniature.check"
Sweep = Callable[..., list[dict[str, Any]]]
Plan = Callable[..., list[list[str]]]


class NoteTaker(Launcher):
    """Finishes every job at once, unless told to end in an exception."""

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
    """The jobs in the sweep.json of the working directory."""
    return list(json.loads(Path("sweep/sweep.json").read_text())["jobs"])


def received(job: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a job's task function was called with."""
    return dict(json.loads(Path(job["dir"], "received.json").read_text()))


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes that the process was told."""
    codes: list[int] = []
    monkeypatch.setattr(exit_codes, "record_exit_code", codes.append)
    return codes


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: list[int]) -> Sweep:
    """Run the miniature application in an empty folder; the answer is what sweep.json says."""
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
    """What Hydra gives a sweeper of the miniature application, composed once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APP)
        import miniature  # type: ignore[import-not-found, unused-ignore]  # noqa: F401  (registers its schema)

        with initialize_config_dir(str(APP / "conf"), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            one_folder = "hydra.sweep.subdir=${hydra:runtime.choices.model}"  # for all jobs that share a trial
            config = compose("config", overrides=[CHECK, one_folder], return_hydra_config=True)
    return HydraContext(config_loader=loader, callbacks=Callbacks()), config


@pytest.fixture
def launcher() -> NoteTaker:
    return NoteTaker()


@pytest.fixture
def plan(
    master: tuple[HydraContext, DictConfig],
    launcher: NoteTaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noted: list[int],
) -> Plan:
    """The overrides of every job that the sweeper hands to its launcher, with nothing trained."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **settings: object) -> list[list[str]]:
        sweeper = StackedSweeper(**{"check": "miniature.check", **settings})
        sweeper.hydra_context, sweeper.config = master
        sweeper.launcher = launcher
        sweeper.sweep(list(arguments))
        return [job for batch in launcher.batches for job in batch]

    return run


def launched_in_subprocess(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The miniature application as a program of its own, for launchers that start workers."""
    path = os.pathsep.join([str(ROOT), str(APP), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-m", "miniature", *arguments, CHECK],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
    )
    return list(json.loads((folder / "sweep" / "sweep.json").read_text())["jobs"])


def test_swept_losses_and_seeds_share_a_job_and_everything_else_makes_jobs(sweep: Sweep) -> None:
    answer = sweep("-m", "model=mlp,cnn", "loss=nll,ce", "seed=range(3)")
    assert [job["overrides"] for job in answer] == [
        ["model=mlp", "loss=[nll,ce]", "seed=[0,1,2]"],
        ["model=cnn", "loss=[nll,ce]", "seed=[0,1,2]"],
    ]
    assert [received(job)["model"]["hidden"] for job in answer] == [8, 4]
    assert [list(received(job)["loss"]) for job in answer] == [["nll", "ce"]] * 2
    assert [received(job)["seed"] for job in answer] == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("argument", "stacked"),
    [
        ("seed=range(0,10,3)", "seed=[0,3,6,9]"),
        ("seed=choice(5,2)", "seed=[5,2]"),
        ("++seed=0,1", "++seed=[0,1]"),
        ("seed=3", "seed=3"),
        ("seed=[4,5]", "seed=[4,5]"),
        ("loss=glob(*)", "loss=[ce,kl,nll]"),
        ("loss=glob(*,exclude=nll)", "loss=[ce,kl]"),
    ],
)
def test_a_stack_axis_takes_every_discrete_sweep(plan: Plan, argument: str, stacked: str) -> None:
    assert plan(argument) == [[stacked]]


def test_a_shuffled_range_is_complete(plan: Plan) -> None:
    ((seeds,),) = plan("seed=shuffle(range(20))")
    assert sorted(json.loads(seeds.removeprefix("seed="))) == list(range(20))


def test_a_choice_of_lists_is_an_ordinary_sweep(plan: Plan) -> None:
    assert plan("loss=[nll,ce],kl", "seed=[0],[1,2]") == [
        ["loss=[nll,ce]", "seed=[0]"],
        ["loss=[nll,ce]", "seed=[1,2]"],
        ["loss=kl", "seed=[0]"],
        ["loss=kl", "seed=[1,2]"],
    ]


def test_the_stack_is_whatever_the_settings_say(plan: Plan) -> None:
    assert plan("loss=nll,ce", "seed=0,1", stack=["seed"]) == [
        ["loss=nll", "seed=[0,1]"],
        ["loss=ce", "seed=[0,1]"],
    ]


def test_without_a_sweep_there_is_one_job_with_the_defaults(plan: Plan) -> None:
    assert plan() == [[]]


def test_jobs_whose_overrides_coincide_are_one_job(plan: Plan) -> None:
    assert plan("model=mlp,cnn,mlp", "model.hidden=2,2") == [
        ["model=mlp", "model.hidden=2"],
        ["model=cnn", "model.hidden=2"],
    ]


def test_the_last_of_two_settings_of_one_key_counts(plan: Plan) -> None:
    assert plan("seed=0,1", "++seed=7,8", "epochs=1,2", "epochs=5") == [["++seed=[7,8]", "epochs=5"]]


def test_a_sweep_kept_in_a_file_yields_to_the_command_line_key_by_key(plan: Plan) -> None:
    kept = {"seed": "range(3)", "model": "mlp,cnn"}
    assert plan("model=cnn", params=kept) == [["seed=[0,1,2]", "model=cnn"]]


def test_overrides_arrive_as_they_were_written(sweep: Sweep) -> None:
    arguments = ["loss=nll,ce", "loss.nll.weight=2", "note='a,b','c=d'", "~experiment"]
    first, second = map(received, sweep("-m", *arguments))
    assert [first["note"], second["note"]] == ["a,b", "c=d"]
    assert first["loss"] == {"nll": {"weight": 2.0}, "ce": {"weight": 1.0}}


def test_the_basic_sweeper_makes_a_job_of_every_combination(
    tmp_path: Path, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["miniature.py", "-m", "hydra/sweeper=basic", "loss=nll,ce", "seed=0,1"])
    sys.modules["miniature"].main()
    assert len(list(tmp_path.glob("sweep/*/received.json"))) == 4


def test_an_experiment_declares_its_own_sweep(sweep: Sweep) -> None:
    answer = sweep("experiment=paired", "model=cnn")
    assert [job["overrides"] for job in answer] == [["loss=[nll,ce]", "seed=[0,1,2]", "model=cnn", "experiment=paired"]]
    assert received(answer[0])["option"] == "cnn"


def test_no_job_holds_more_replicas_than_asked_no_seed_is_lost_and_one_job_concludes(plan: Plan) -> None:
    asked = [[f"model={model}", "loss=[nll,ce]", "seed=[0,1,2,3,4]"] for model in ("mlp", "cnn")]
    shares = [[*job, share] for job in asked for share in ("share=[0,1]", "share=[2,3]", "share=[4]")]
    answer = plan("model=mlp,cnn", "loss=nll,ce", "seed=range(5)", replicas_per_job=5)
    assert answer == [*shares, *([*job, "share=[]"] for job in asked)]


def test_a_job_that_holds_no_more_than_asked_is_not_shared(plan: Plan) -> None:
    assert plan("seed=0,1", replicas_per_job=6) == [["seed=[0,1]"]]


def test_replicas_are_counted_where_the_losses_are_the_default_ones(plan: Plan) -> None:
    shares = ("share=[3,1]", "share=[2]", "share=[]")
    assert plan("++seed=[3,1,2]", replicas_per_job=7) == [["++seed=[3,1,2]", share] for share in shares]


def test_a_seed_whose_losses_exceed_the_limit_still_gets_its_job(plan: Plan) -> None:
    shares = ("share=[0]", "share=[1]", "share=[]")
    assert plan("seed=0,1", replicas_per_job=1) == [["seed=[0,1]", share] for share in shares]


def test_a_share_that_was_given_by_hand_is_not_shared_again(plan: Plan) -> None:
    assert plan("seed=0,1", "share=[1]", replicas_per_job=1) == [["seed=[0,1]", "share=[1]"]]


def test_the_jobs_of_a_batch_conclude_once_all_shares_are_back(plan: Plan, launcher: NoteTaker) -> None:
    plan("seed=0,1,2", replicas_per_job=3, max_batch_size=2)
    assert [[job[-1] for job in batch] for batch in launcher.batches] == [
        ["share=[0]", "share=[1]"],
        ["share=[2]"],
        ["share=[]"],
    ]


@pytest.mark.parametrize(("exit_code", "launched"), [(3, 3), (2, 2)])
def test_lost_shares_are_concluded_on_and_a_request_that_every_share_refused_is_not(
    plan: Plan, launcher: NoteTaker, noted: list[int], exit_code: int, launched: int
) -> None:
    launcher.exit_code = exit_code
    assert len(plan("seed=0,1", replicas_per_job=3)) == launched
    assert noted == [exit_code] * launched


def test_shares_of_which_nothing_is_known_are_concluded_on(plan: Plan, launcher: NoteTaker) -> None:
    launcher.accident = ConnectionError("the cluster is gone")
    assert plan("seed=0,1", replicas_per_job=3)[-1] == ["seed=[0,1]", "share=[]"]


def test_jobs_that_share_a_trial_need_one_folder(sweep: Sweep) -> None:
    with pytest.raises(UsageError, match=r"hydra\.sweep\.subdir gives .* several folders \(0, 1\)"):
        sweep("-m", "seed=0,1", "hydra.sweeper.replicas_per_job=3")
    assert not Path("sweep").exists()


def test_a_failed_job_is_recorded_and_costs_the_others_nothing(
    sweep: Sweep, noted: list[int], capsys: pytest.CaptureFixture[str]
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
    assert noted == [3, 0, 3, 1, 3, 2]
    print_summary = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(print_summary) == 4
    assert print_summary[-1] == "failed: exit_code=2 accident=null: ended with 2"


def test_nothing_but_sweep_json_is_written_beside_the_jobs(sweep: Sweep, tmp_path: Path) -> None:
    (job,) = sweep("-m")
    assert sorted(path.name for path in tmp_path.glob("sweep/*")) == ["0", "sweep.json"]
    assert list(job) == ["overrides", "dir", "status", "exit_code", "error"]
    assert job["dir"] == str(tmp_path / "sweep" / "0")


def test_an_interrupted_sweep_leaves_its_jobs_listed_as_unknown(plan: Plan, launcher: NoteTaker) -> None:
    launcher.accident = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        plan("epochs=3,4")
    assert [(job["overrides"], job["status"]) for job in jobs()] == [
        (["epochs=3"], "unknown"),
        (["epochs=4"], "unknown"),
    ]


def test_a_launcher_that_breaks_down_is_a_lost_run_and_later_batches_still_start(
    plan: Plan, launcher: NoteTaker, noted: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.accident = ConnectionError("the cluster\nis gone")
    plan("epochs=1,2,3", max_batch_size=2)
    assert launcher.batches == [[["epochs=1"], ["epochs=2"]], [["epochs=3"]]]
    assert {(job["status"], job["exit_code"]) for job in jobs()} == {("unknown", None)}
    assert noted == [3, 3, 3]
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
def test_a_wrong_request_is_refused_in_one_line_before_any_job(
    plan: Plan, launcher: NoteTaker, noted: list[int], arguments: list[str], line: str
) -> None:
    with pytest.raises(UsageError) as refused:
        plan(*arguments)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (launcher.batches, noted, Path("sweep").exists()) == ([], [], False)


@pytest.mark.parametrize("setting", ["max_batch_size", "replicas_per_job"])
def test_a_limit_below_one_is_refused(plan: Plan, setting: str) -> None:
    with pytest.raises(UsageError, match=f"hydra.sweeper.{setting}=0: give an integer >= 1"):
        plan(**{setting: 0})


def test_options_of_a_users_own_folder_are_listed(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "focal.yaml").write_text("focal: {weight: 1.0}\n")
    with pytest.raises(UsageError, match="loss=fokal: no such option; there is ce, focal, kl, nll"):
        sweep("-m", "loss=focal,fokal", f"hydra.searchpath=[file://{tmp_path}/mine]")


def test_a_folder_that_cannot_be_written_is_refused(plan: Plan, launcher: NoteTaker) -> None:
    Path("sweep").write_text("a file where the folder should be")
    with pytest.raises(UsageError, match=r"cannot write to sweep: .*; free space or choose another folder"):
        plan()
    assert launcher.batches == []


def test_under_joblib_a_killed_worker_costs_its_own_batch_alone(tmp_path: Path) -> None:
    answer = launched_in_subprocess(
        tmp_path,
        "-m",
        "accident=die,null",
        "model=mlp,cnn",
        "seed=0,1",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "hydra.sweeper.max_batch_size=2",
    )
    assert [job["status"] for job in answer] == ["unknown", "unknown", "done", "done"]
    assert all(job["error"].startswith("TerminatedWorkerError: ") for job in answer[:2])
    assert [received(job)["seed"] for job in answer[2:]] == [[0, 1]] * 2


@pytest.mark.slow
def test_submitit_on_this_machine_runs_the_same_jobs(tmp_path: Path) -> None:
    arguments = ["model=mlp,cnn", "loss=nll,ce", "seed=0,1", "hydra/launcher=submitit_local"]
    answer = launched_in_subprocess(tmp_path, "-m", *arguments)
    assert [job["status"] for job in answer] == ["done", "done"]
    assert [received(job)["option"] for job in answer] == ["mlp", "cnn"]
    assert [received(job)["seed"] for job in answer] == [[0, 1]] * 2


INSIDE_HYDRA = ("hydra._internal", "hydra.core")


def test_the_names_that_are_taken_from_inside_hydra_are_known() -> None:
    """Hydra 1.4 may move them: this list, and `hydra_glue.DEFAULTS_LIST`, is all there is to look at."""
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
