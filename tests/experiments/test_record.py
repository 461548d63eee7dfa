"""The recorder of experiments: which commands it reads, what it writes, and that a number that moved is noticed."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.commands import BEGIN, END, Command, read, with_block
from experiments.record import EXPERIMENTS, chosen, run
from experiments.results import COLUMNS, compare, markdown, recorded
from likelihood_lab.errors import UsageError
from pipeline.entry import ExitCode

TINY = "'loss=[ce,kl_mean,nll]' 'seed=[0,1]' epochs=1 audit=false controls=none tracking=none trainer.progress=false"
EXPECT = "'expect={nll: identical, kl_mean: same}'"
COMMAND = f"$ python -m pipeline.train {TINY} \\\n    {EXPECT} hydra.run.dir=outputs/tiny/one"


def readme(folder: Path, console: str, block: str = f"{BEGIN}\nold\n{END}", slug: str = "tiny") -> Path:
    path = folder / "experiments" / slug / "README.md"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"# Question\n\n```console\n{console}\n```\n\n## Found\n\n{block}\n\nWhat it means.\n", encoding="utf-8"
    )
    return path


# --- reading


def test_commands_are_read_with_their_continuations_and_others_are_named(tmp_path: Path) -> None:
    console = f"{COMMAND}\n  a line of output\n$ make equivalence\n$ python -m pipeline.train epochs=1   # no folder"
    found = read(readme(tmp_path, console))
    (command,) = found.commands
    assert command.trial == "one"
    assert command.words[0] == "loss=[ce,kl_mean,nll]"
    assert command.words[-2:] == ("expect={nll: identical, kl_mean: same}", "hydra.run.dir=outputs/tiny/one")
    assert found.others == ("make equivalence", "python -m pipeline.train epochs=1   # no folder")


def test_another_folder_and_no_tracking(tmp_path: Path) -> None:
    (command,) = read(readme(tmp_path, COMMAND)).commands
    words = command.into(Path("/elsewhere/one")).words
    assert [word for word in words if word.startswith(("hydra.run.dir", "tracking"))] == [
        "tracking=none", "hydra.run.dir=/elsewhere/one",
    ]  # fmt: skip
    assert words[0] == "loss=[ce,kl_mean,nll]"


@pytest.mark.parametrize(
    ("console", "said"),
    [
        ("$ python -m pipeline.train hydra.run.dir=outputs/other/one", "should read hydra.run.dir=outputs/tiny/TRIAL"),
        ("$ python -m pipeline.train hydra.run.dir=outputs/tiny/../one", "should read"),
        ("$ python -m pipeline.train 'loss=[ce hydra.run.dir=outputs/tiny/one", "cannot be read"),
        (f"{COMMAND}\n{COMMAND}", "two commands train into outputs/tiny/one"),
    ],
)
def test_a_command_that_would_write_elsewhere_is_refused(console: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        read(readme(tmp_path, console))


def test_the_block_is_replaced_and_nothing_else() -> None:
    assert with_block(f"before\n{BEGIN}\nold\n{END}\nafter\n", ["new", "lines"]) == (
        f"before\n{BEGIN}\nnew\nlines\n{END}\nafter\n"
    )


@pytest.mark.parametrize("block", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"])
def test_a_readme_without_its_block_is_refused_before_anything_runs(block: str, tmp_path: Path) -> None:
    readme(tmp_path, COMMAND, block)
    assert run(["tiny"], again=False, experiments=tmp_path / "experiments") is ExitCode.USAGE
    assert not (tmp_path / "outputs").exists()


def test_a_figure_of_no_trial_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme(tmp_path, COMMAND, f"{BEGIN}\n{END}\n<!-- figure: two/difference-nll.svg -->")
    assert run(["tiny"], again=False, experiments=tmp_path / "experiments") is ExitCode.USAGE
    assert "the figure two/difference-nll.svg is of none of the trials, one" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_unknown_experiments_and_such_without_commands_are_one_line(tmp_path: Path) -> None:
    readme(tmp_path, "$ make equivalence")
    with pytest.raises(UsageError, match=r"no experiment 'tinny' \(did you mean 'tiny'\?\)"):
        chosen(["tinny"], tmp_path / "experiments")
    with pytest.raises(UsageError, match="has no command of this form"):
        chosen(["tiny"], tmp_path / "experiments")
    (left_alone,) = chosen([], tmp_path / "experiments")
    assert left_alone.commands == ()


def test_the_shell_gets_one_line_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "experiments.record", "no_such_thing"]
    ended = subprocess.run(command, cwd=EXPERIMENTS.parent, capture_output=True, text=True, check=False)
    assert ended.returncode == ExitCode.USAGE
    assert ended.stderr.startswith("error: no experiment 'no_such_thing'")
    assert ended.stderr.count("\n") == 1


def test_every_recorded_readme_can_be_read_and_has_results_of_today() -> None:
    for found in chosen([], EXPERIMENTS):
        path = found.path.parent / "results.csv"
        if found.commands and path.exists():
            trials = set(recorded(path)["trial"])
            assert trials == {command.trial for command in found.commands}, found.slug
            assert END in found.path.read_text(encoding="utf-8")


# --- recording and checking


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with one recorded experiment; kl_mean is expected to be what it is not."""
    root = tmp_path_factory.mktemp("tree")
    readme(root, COMMAND)
    assert run(["tiny"], again=False, experiments=root / "experiments") is ExitCode.HOLDS
    return root


def test_a_record_has_every_loss_and_metric(tree: Path) -> None:
    table = recorded(tree / "experiments" / "tiny" / "results.csv")
    assert list(table.columns) == COLUMNS
    assert set(table["loss"]) == {"ce", "kl_mean", "nll"}
    rows = table.set_index(["loss", "metric"])
    assert rows.loc[("nll", "nll"), "outcome"] == "identical"
    assert rows.loc[("nll", "nll"), "mean_difference"] == 0
    assert rows.loc[("kl_mean", "nll"), "confirmed"] == "False"
    assert rows.loc[("ce", "nll"), "mean"] == rows.loc[("nll", "nll"), "mean"]
    ratio = rows.loc[("kl_mean", "nll"), "mean"] / rows.loc[("ce", "nll"), "mean"]
    assert math.log(ratio) == pytest.approx(rows.loc[("kl_mean", "nll"), "mean_difference"], abs=0.02)


def test_the_readme_tells_what_was_found_and_where(tree: Path) -> None:
    text = (tree / "experiments" / "tiny" / "README.md").read_text(encoding="utf-8")
    assert "| one | `nll` | identical | not run | identical | identical | 0 | identical holds |" in text
    assert "same **does not hold** |" in text
    assert "\nold\n" not in text
    assert "* one: the reference `ce` reaches a test NLL of " in text
    assert text.endswith(f"{END}\n\nWhat it means.\n")
    assert "outside of a git repository; cpu" in text
    assert "CPU time: one " in text
    assert (tree / "experiments" / "tiny" / "figure.svg").read_text(encoding="utf-8").lstrip().startswith("<")


def test_the_same_again_is_bit_for_bit_and_touches_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}

    before = state()
    assert run(["tiny"], again=True, experiments=tree / "experiments") is ExitCode.HOLDS
    assert "tiny one: bit for bit" in capsys.readouterr().out
    assert state() == before


@pytest.fixture
def trained_before(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be trained again is copied from the record's own trial."""

    def copied(command: Command, root: Path) -> float:
        shutil.copytree(tree / "outputs" / "tiny" / "one", command.words[-1].removeprefix("hydra.run.dir="))
        return 0.0

    monkeypatch.setattr("experiments.record.train", copied)


@pytest.mark.usefixtures("trained_before")
def test_a_record_that_another_run_does_not_bear_out_has_moved(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tree / "experiments", tmp_path / "experiments")
    path = tmp_path / "experiments" / "tiny" / "results.csv"
    table = recorded(path)
    here = (table["loss"] == "kl_mean") & (table["metric"] == "nll")
    table.loc[here, "mean_difference"] -= 0.02  # a fifth of the margin
    table.to_csv(path, index=False)
    assert run(["tiny"], again=True, experiments=tmp_path / "experiments") is ExitCode.REFUTED
    said = capsys.readouterr().out
    assert "tiny one: moved\n" in said
    assert "tiny one: kl_mean, nll mean_difference: " in said


@pytest.mark.usefixtures("trained_before")
def test_a_recorded_trial_without_a_command_has_moved(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tree / "experiments", tmp_path / "experiments")
    path = tmp_path / "experiments" / "tiny" / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("outputs/tiny/one", "outputs/tiny/two"), encoding="utf-8")
    assert run(["tiny"], again=True, experiments=tmp_path / "experiments") is ExitCode.REFUTED
    said = capsys.readouterr().out
    assert "tiny one: moved: it has no command any more" in said
    assert "tiny two: moved\ntiny two: ce, accuracy: was not recorded\n" in said


def test_a_trial_without_its_data_is_skipped_visibly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = f"$ python -m pipeline.train {TINY} dataset=fashion_mnist dataset.root={tmp_path}/nothing"
    path = readme(tmp_path, f"{console} hydra.run.dir=outputs/tiny/one")
    assert run(["tiny"], again=False, experiments=tmp_path / "experiments") is ExitCode.HOLDS
    assert "tiny: skipped, nothing was written: " in capsys.readouterr().out
    assert "old" in path.read_text(encoding="utf-8")


def test_a_refused_command_is_told_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = readme(tmp_path, "$ python -m pipeline.train epochs=0 hydra.run.dir=outputs/tiny/one")
    assert run(["tiny"], again=False, experiments=tmp_path / "experiments") is ExitCode.USAGE
    assert "error: trial one was refused: epochs=0; it must be at least 1" in capsys.readouterr().err
    assert "old" in path.read_text(encoding="utf-8")


# --- comparing


def rows(**changes: object) -> pd.DataFrame:
    """A candidate and a control; NaN where nothing was there."""
    numbers = {
        "mean": 0.2, "sd": 0.01, "mean_difference": 0.04, "ci_low": 0.01, "ci_high": 0.07, "p_tost": 0.01,
        "margin": 0.1, "level": 0.05,
    }  # fmt: skip
    words = {
        "trial": "one", "loss": "kl_mean", "metric": "nll", "kind": "candidate", "outcome": "equivalent", "n": "10",
        "failures": "0", "verdict": "different", "objective": "scaled", "expected": "scaled", "confirmed": "True",
        "first_steps": "outside", "seeds_needed": "",
    }  # fmt: skip
    replay = dict.fromkeys(COLUMNS, "") | dict.fromkeys(numbers, math.nan)
    replay |= {"trial": "one", "loss": "replay", "kind": "control", "outcome": "identical"}
    return pd.DataFrame([words | numbers | changes, replay], columns=COLUMNS)


def test_equal_rows_are_equal_bit_for_bit() -> None:
    assert compare(rows(), rows()).word == "bit for bit"
    assert compare(rows(mean_difference=math.nan), rows(mean_difference=math.nan)).word == "bit for bit"


@pytest.mark.parametrize(
    "changes",
    [{"mean_difference": 0.0499}, {"mean_difference": 0.0301}, {"mean": 0.2099}, {"p_tost": 0.02}, {"ci_low": 0.0}],
)
def test_small_changes_hold(changes: dict[str, float]) -> None:
    assert compare(rows(), rows(**changes)).word == "holds"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean_difference": 0.0501}, "kl_mean, nll mean_difference: 0.04 -> 0.0501"),
        ({"mean_difference": math.nan}, "kl_mean, nll mean_difference: 0.04 -> nan"),
        ({"mean": 0.211}, "kl_mean, nll mean: 0.2 -> 0.211"),
        ({"outcome": "inconclusive"}, "kl_mean, nll outcome: equivalent -> inconclusive"),
        ({"confirmed": "False"}, "kl_mean, nll confirmed: True -> False"),
        ({"n": "9"}, "kl_mean, nll n: 10 -> 9"),
        ({"failures": "1"}, "kl_mean, nll failures: 0 -> 1"),
        ({"margin": 0.2}, "kl_mean, nll margin: 0.1 -> 0.2"),
    ],
)
def test_what_moved_is_named_with_old_and_new(changes: dict[str, object], said: str) -> None:
    found = compare(rows(), rows(**changes))
    assert found.word == "moved"
    assert said in found.moved


def test_a_difference_may_not_leave_its_interval_but_for_rounding() -> None:
    narrow = rows(ci_low=0.0399, ci_high=0.0401)
    assert compare(narrow, rows(ci_low=0.0399, ci_high=0.0401, mean_difference=0.0408)).word == "holds"
    assert compare(narrow, rows(ci_low=0.0399, ci_high=0.0401, mean_difference=0.042)).word == "moved"


def test_where_no_seed_differed_none_may() -> None:
    none = {"mean_difference": 0.0, "ci_low": math.nan, "ci_high": math.nan}
    assert compare(rows(**none), rows(**none)).word == "bit for bit"
    assert compare(rows(**none), rows(**none | {"mean_difference": 1e-9})).word == "moved"


def test_rows_that_are_gone_or_new_have_moved() -> None:
    assert compare(rows(), rows().head(1)).moved == ("replay: is no longer found",)
    assert compare(rows().head(1), rows()).moved == ("replay: was not recorded",)


def test_intervals_carry_their_level() -> None:
    assert "[95 % interval]" in markdown(rows())[0]
    assert "| +0.04 [+0.01, +0.07] |" in markdown(rows())[2]
    assert markdown(rows())[-1] == "* one: controls: replay identical."


@pytest.mark.parametrize("damage", ["", "a,b\n1,2\n", "half"])
def test_a_damaged_record_is_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    rows().to_csv(path, index=False)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace("0.04", "0.0.4") if damage == "half" else damage, encoding="utf-8")
    with pytest.raises(UsageError, match=r"is damaged .*; record it again|is damaged: .*; record it again"):
        recorded(path)
    with pytest.raises(UsageError, match="is not there; record it again"):
        recorded(tmp_path / "none" / "results.csv")
