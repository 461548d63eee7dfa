"""Test the recorder of experiments: the commands it reads, the files it writes, and the changes it detects."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from experiments.commands import BEGIN, END, Command, read, with_block
from experiments.record import EXPERIMENTS, chosen, main, run
from experiments.results import COLUMNS, compare, markdown, recorded
from likelihood_lab.errors import UsageError
from pipeline.entry import ExitCode

TINY = (
    "'loss=[ce,kl_mean,nll]' 'seed=[0,1]' epochs=1 audit=false protocol.controls=none "
    "tracking=none trainer.progress=false"
)
EXPECT = "'expect={nll: identical, kl_mean: same}'"
COMMAND = f"$ python -m pipeline.train {TINY} \\\n    {EXPECT} hydra.run.dir=outputs/tiny/one"


def readme(folder: Path, console: str, block: str = f"{BEGIN}\nold\n{END}") -> Path:
    path = folder / "experiments" / "tiny" / "README.md"
    path.parent.mkdir(parents=True)
    text = f"# Question\n\n```console\n{console}\n```\n\n## Found\n\n{block}\n\nWhat it means.\n"
    path.write_text(text, encoding="utf-8")
    return path


def run_tiny(root: Path, again: bool = False) -> ExitCode:
    return run(["tiny"], again, root / "experiments")


# --- reading


def test_read_joins_continued_lines_and_lists_other_commands(tmp_path: Path) -> None:
    console = f"{COMMAND}\n  a line of output\n$ make equivalence\n$ python -m pipeline.train epochs=1   # no folder"
    content = read(readme(tmp_path, console))
    (command,) = content.commands
    assert command.trial == "one"
    assert command.words[0] == "loss=[ce,kl_mean,nll]"
    assert command.words[-2:] == ("expect={nll: identical, kl_mean: same}", "hydra.run.dir=outputs/tiny/one")
    assert content.others == ("make equivalence", "python -m pipeline.train epochs=1   # no folder")
    moved = command.into(Path("/elsewhere/one")).words
    assert [word for word in moved if word.startswith(("hydra.run.dir", "tracking"))] == [
        "tracking=none", "hydra.run.dir=/elsewhere/one",
    ]  # fmt: skip
    assert moved[0] == command.words[0]


@pytest.mark.parametrize(
    ("console", "message"),
    [
        ("$ python -m pipeline.train hydra.run.dir=outputs/other/one", "should read hydra.run.dir=outputs/tiny/TRIAL"),
        ("$ python -m pipeline.train hydra.run.dir=outputs/tiny/../one", "should read"),
        ("$ python -m pipeline.train 'loss=[ce hydra.run.dir=outputs/tiny/one", "cannot be read"),
        (f"{COMMAND}\n{COMMAND}", "two commands train into outputs/tiny/one"),
    ],
)
def test_read_refuses_a_command_for_another_folder(console: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read(readme(tmp_path, console))


def test_with_block_replaces_only_the_block() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_block(text, ["new", "lines"]) == f"before\n{BEGIN}\nnew\nlines\n{END}\nafter\n"


FORM = "needs the lines"
FIGURE = "the figure two/difference-nll.svg is of none of the trials, one"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("", FORM), (BEGIN, FORM), (f"{END}\n{BEGIN}", FORM), (f"{BEGIN}\n{END}\n{BEGIN}\n{END}", FORM),
        (f"{BEGIN}\n{END}\n<!-- figure: two/difference-nll.svg -->", FIGURE),
    ],
)  # fmt: skip
def test_record_refuses_a_wrong_readme_before_it_trains(
    block: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme(tmp_path, COMMAND, block)
    assert run_tiny(tmp_path) is ExitCode.USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_chosen_refuses_unknown_experiments_and_those_without_commands(tmp_path: Path) -> None:
    readme(tmp_path, "$ make equivalence")
    with pytest.raises(UsageError, match=r"no experiment 'tinny' \(did you mean 'tiny'\?\)"):
        chosen(["tinny"], tmp_path / "experiments")
    with pytest.raises(UsageError, match="has no command of this form"):
        chosen(["tiny"], tmp_path / "experiments")
    assert [content.commands for content in chosen([], tmp_path / "experiments")] == [()]


def test_main_prints_one_line_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["record", "no_such_thing"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == ExitCode.USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: no experiment 'no_such_thing'")
    assert error.count("\n") == 1


def test_recorded_results_are_those_of_the_readmes_commands() -> None:
    for content in chosen([], EXPERIMENTS):
        path = content.path.parent / "results.csv"
        if content.commands and path.exists():
            assert set(recorded(path)["trial"]) == {command.trial for command in content.commands}, content.slug
            assert END in content.path.read_text(encoding="utf-8")


# --- recording and checking


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record an experiment in which the expectation for kl_mean is wrong."""
    root = tmp_path_factory.mktemp("tree")
    readme(root, COMMAND)
    assert run_tiny(root) is ExitCode.HOLDS
    return root


def test_record_has_every_loss_and_metric(tree: Path) -> None:
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


def test_readme_has_results_and_environment(tree: Path) -> None:
    text = (tree / "experiments" / "tiny" / "README.md").read_text(encoding="utf-8")
    assert "| one | `nll` | identical | not run | identical | identical | 0 | identical holds |" in text
    assert "same **does not hold** |" in text
    assert "\nold\n" not in text
    assert "* one: the reference `ce` reaches a test NLL of " in text
    assert text.endswith(f"{END}\n\nWhat it means.\n")
    assert "outside of a git repository; cpu" in text
    assert "CPU time: one " in text
    assert (tree / "experiments" / "tiny" / "figure.svg").read_text(encoding="utf-8").lstrip().startswith("<")


def test_check_of_the_same_run_is_bit_for_bit_and_writes_nothing(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}

    before = state()
    assert run_tiny(tree, again=True) is ExitCode.HOLDS
    assert "tiny one: bit for bit" in capsys.readouterr().out
    assert state() == before


@pytest.fixture
def copied(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the experiment, in which a training command copies the recorded trial."""

    def copy(command: Command, root: Path) -> float:
        shutil.copytree(tree / "outputs" / "tiny" / "one", command.words[-1].removeprefix("hydra.run.dir="))
        return 0.0

    monkeypatch.setattr("experiments.record.train", copy)
    shutil.copytree(tree / "experiments", tmp_path / "experiments")
    return tmp_path


def test_check_reports_a_changed_number(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "experiments" / "tiny" / "results.csv"
    table = recorded(path)
    here = (table["loss"] == "kl_mean") & (table["metric"] == "nll")
    table.loc[here, "mean_difference"] -= 0.02  # a fifth of the margin
    table.to_csv(path, index=False)
    assert run_tiny(copied, again=True) is ExitCode.REFUTED
    output = capsys.readouterr().out
    assert "tiny one: moved\n" in output
    assert "tiny one: kl_mean, nll mean_difference: " in output


def test_check_reports_a_recorded_trial_without_a_command(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "experiments" / "tiny" / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("outputs/tiny/one", "outputs/tiny/two"), encoding="utf-8")
    assert run_tiny(copied, again=True) is ExitCode.REFUTED
    output = capsys.readouterr().out
    assert "tiny one: moved: its command is gone" in output
    assert "tiny two: moved\ntiny two: ce, accuracy: was not recorded\n" in output


@pytest.mark.parametrize(
    ("words", "code", "stream", "message"),
    [
        (
            f"{TINY} dataset=fashion_mnist dataset.root=/no/such/folder",
            ExitCode.HOLDS, "out", "tiny: skipped, nothing was written: ",
        ),
        ("epochs=0", ExitCode.USAGE, "err", "error: trial one was refused: epochs=0; it must be at least 1"),
    ],
    ids=["absent data", "refused command"],
)  # fmt: skip
def test_record_without_results_leaves_the_readme(
    words: str, code: ExitCode, stream: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = readme(tmp_path, f"$ python -m pipeline.train {words} hydra.run.dir=outputs/tiny/one")
    assert run_tiny(tmp_path) is code
    assert message in getattr(capsys.readouterr(), stream)
    assert "old" in path.read_text(encoding="utf-8")


# --- comparing


def rows(**changes: object) -> pd.DataFrame:
    """A candidate and a control; NaN is a missing value."""
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


NARROW = {"ci_low": 0.0399, "ci_high": 0.0401}
UNIFORM = {"mean_difference": 0.0, "ci_low": math.nan, "ci_high": math.nan}  # no seed differs


@pytest.mark.parametrize(
    ("recorded_values", "changes", "word"),
    [
        ({}, {}, "bit for bit"),
        ({"mean_difference": math.nan}, {}, "bit for bit"),
        ({}, {"mean_difference": 0.0499}, "holds"),
        ({}, {"mean_difference": 0.0301}, "holds"),
        ({}, {"mean": 0.2099}, "holds"),
        ({}, {"p_tost": 0.02}, "holds"),
        ({}, {"ci_low": 0.0}, "holds"),
        (NARROW, {"mean_difference": 0.0408}, "holds"),  # outside the interval, within the allowance for rounding
        (NARROW, {"mean_difference": 0.042}, "moved"),
        (UNIFORM, {}, "bit for bit"),
        (UNIFORM, {"mean_difference": 1e-9}, "moved"),
    ],
)
def test_compare_word(recorded_values: dict[str, float], changes: dict[str, float], word: str) -> None:
    assert compare(rows(**recorded_values), rows(**recorded_values | changes)).word == word


@pytest.mark.parametrize(
    ("changes", "line"),
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
def test_compare_names_old_and_new_values(changes: dict[str, object], line: str) -> None:
    comparison = compare(rows(), rows(**changes))
    assert comparison.word == "moved"
    assert line in comparison.moved


def test_compare_names_rows_that_are_gone_or_new() -> None:
    assert compare(rows(), rows().head(1)).moved == ("replay: is no longer found",)
    assert compare(rows().head(1), rows()).moved == ("replay: was not recorded",)


def test_markdown_has_intervals_with_their_level() -> None:
    header, _, row, *_, last = markdown(rows())
    assert "[95 % interval]" in header
    assert "| +0.04 [+0.01, +0.07] |" in row
    assert last == "* one: controls: replay identical."


@pytest.mark.parametrize("damage", ["", "a,b\n1,2\n", "half", None])
def test_recorded_refuses_a_damaged_or_absent_file(damage: str | None, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    text = rows().to_csv(index=False).replace("0.04", "0.0.4") if damage == "half" else damage
    if text is not None:
        path.write_text(text, encoding="utf-8")
    reason = "is not there" if damage is None else "is damaged.*"
    with pytest.raises(UsageError, match=f"{reason}; record it again"):
        recorded(path)
