"""The documentation stays true: its code runs or compiles, its commands compose, its links lead somewhere."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement

import likelihood_lab
from experiments.record import EXPERIMENTS, chosen
from hydra_plugins.stacked_sweeper.stacked_sweeper import StackedSweeper
from likelihood_lab.audit.api import assert_same_loss
from pipeline.config import schema as conf
from pipeline.config.validate import validate, validate_audit, validate_loss

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").rglob("*.md")])
FENCED = re.compile(r"^(?P<fence>`{3,})(?P<language>\w*)\n(?P<body>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
HEAD = re.compile(r"(?:# @package _global_\n)?(?:# |<!-- )(?P<path>[\w./-]+\.(?:py|ya?ml|md))\b")
OWN = ("my_", "conf/experiment/", "experiments/")  # what a reader of docs/extending.md adds to the checkout
PLACEHOLDERS = ("OPTIMIZER", "TRIAL")  # words that a README's command leaves to the reader


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    body: str

    @property
    def file(self) -> str | None:
        """The file that the block's head names."""
        head = HEAD.match(self.body)
        return head["path"] if head else None


def blocks(page: Path) -> Iterator[Block]:
    for found in FENCED.finditer(page.read_text(encoding="utf-8")):
        yield Block(page, found["language"], found["body"])


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


@dataclass(frozen=True)
class Command:
    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{named(self.page)}: {shlex.join(self.words)}"


def commands(block: Block) -> Iterator[Command]:
    """The commands after `$ `, continued lines joined, from `python` on."""
    for line in re.sub(r"\\\n\s*", "", block.body).splitlines():
        words = shlex.split(line, comments=True) if line.startswith("$ ") else []
        starts = [i for i, word in enumerate(words) if word.rpartition("/")[2] == "python"]
        if starts and words[starts[0] + 1 : starts[0] + 2] == ["-m"]:
            yield Command(block.page, tuple(words[starts[0] + 2 :]))


COMMANDS = [command for block in BLOCKS if block.language == "console" for command in commands(block)]
HYDRA = ("pipeline.train", "pipeline.audit")
COMPOSED = [command for command in COMMANDS if command.words[0] in HYDRA]
OTHERS = [c for c in COMMANDS if c not in COMPOSED and c.words[0].startswith(("pipeline.", "experiments."))]


# --- code


def test_there_is_something_to_check() -> None:
    assert len(PAGES) > 10
    assert {block.page.name for block in PYTHON} >= {"README.md", "extending.md", "pytest.md"}
    assert {command.page.parent.name for command in COMPOSED} >= {"docs", "equivalence", "textbook_spellings"}


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{named(block.page)}:{block.body.splitlines()[0]}")
def test_python_compiles(block: Block) -> None:
    compile(block.body, named(block.page), "exec")


@pytest.mark.parametrize("language", ["yaml", "json"])
def test_configuration_and_json_parse(language: str) -> None:
    found = [block for block in BLOCKS if block.language == language]
    assert found
    for block in found:
        assert (yaml.safe_load if language == "yaml" else json.loads)(block.body)


WRONG = "test_wrong.py"  # is said to fail
TESTED = {block.file: block for block in PYTHON if block.page.name == "pytest.md" and block.file is not None}


def functions_of(file: str) -> dict[str, Callable[..., None]]:
    """The test functions of a file that docs/pytest.md shows."""
    namespace: dict[str, Any] = {}
    exec(compile(TESTED[file].body, file, "exec"), namespace)  # noqa: S102 - the documentation's own
    return {name: value for name, value in namespace.items() if name.startswith("test_")}


@pytest.mark.parametrize("file", sorted(set(TESTED) - {WRONG}))
def test_the_documented_tests_pass(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_two_classes(*losses: Any, **asked: Any) -> None:
        """That the calls are right is tested here, not how much they cover."""
        assert_same_loss(*losses, **asked, num_classes=(2,))

    monkeypatch.setattr(likelihood_lab, "assert_same_loss", with_two_classes)
    tests = functions_of(file)
    assert tests
    for test in tests.values():
        test(*[with_two_classes for name in inspect.signature(test).parameters if name == "assert_same_loss"])


def test_the_documented_failure_is_what_is_said() -> None:
    (shown,) = (block.body for block in blocks(ROOT / "docs" / "pytest.md") if block.body.startswith("E   "))
    (test,) = functions_of(WRONG).values()
    with pytest.raises(AssertionError) as failed:
        test()
    said = [line.strip() for line in shown.removeprefix("E   AssertionError: ").splitlines()]
    assert str(failed.value).splitlines() == said


# --- commands


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of docs/extending.md and the README, where a reader puts them."""
    folder = tmp_path_factory.mktemp("reader")
    for block in BLOCKS:
        if block.file and block.file.startswith(OWN):
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body, encoding="utf-8")
    return folder


def parsed(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The configuration folders and the overrides of a Hydra command; a flag that it does not have fails."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args([word for word in words if word not in PLACEHOLDERS])
    return given.config_dir, given.overrides


def jobs(overrides: list[str]) -> list[list[str]]:
    """As few jobs of a sweep as have every swept value."""
    sweeper = StackedSweeper()
    choices = [sweeper.choices(override) for override in OverridesParser.create().parse_overrides(overrides)]
    count = max(map(len, choices), default=1)
    return [[values[min(k, len(values) - 1)] for values in choices] for k in range(count)]


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    """Hydra reads each configuration file once."""
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        yield


@contextmanager
def composed(command: Command, reader: Path) -> Iterator[list[DictConfig]]:
    """The configuration of each job, while Hydra knows of the last."""
    folders, overrides = parsed(command.words[1:])
    searched = [reader / folder if (reader / folder).is_dir() else ROOT / folder for folder in folders]
    assert all(path.is_dir() for path in searched), f"{command}: no such configuration folder"
    if command.page.name == "extending.md":
        searched.append(reader / "conf")
    search = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in searched)}]"] if searched else []
    name = command.words[0].removeprefix("pipeline.")
    try:
        made = [compose(name, overrides=[*job, *search], return_hydra_config=True) for job in jobs(overrides)]
        HydraConfig.instance().set_config(made[-1])
        yield made
    finally:
        HydraConfig.instance().cfg = None


@pytest.mark.parametrize("command", COMPOSED, ids=str)
def test_a_command_composes_and_is_not_refused(
    command: Command, readers_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(readers_folder)
    with composed(command, readers_folder) as made:
        for cfg in made:
            if "my_package" in str(cfg.loss):  # stands for the reader's own
                continue
            (validate if command.words[0] == "pipeline.train" else validate_audit)(cfg)
            for loss, declared in cfg.loss.items():  # an audit asks no more than their form before it runs
                validate_loss(f"loss.{loss}", OmegaConf.to_container(declared))


@pytest.mark.parametrize("wrong", ["epoch=1", "loss=[ce,no_such_loss]", "model=mlp,no_such_model", "--no-such"])
def test_a_command_with_a_mistake_would_be_noticed(wrong: str, readers_folder: Path) -> None:
    command = Command(ROOT / "README.md", ("pipeline.train", wrong))
    with pytest.raises((HydraException, argparse.ArgumentError, SystemExit)), composed(command, readers_folder):
        pass


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_any_other_module_of_ours_is_there(command: Command) -> None:
    module, *words = command.words
    assert importlib.util.find_spec(module) is not None
    if module == "experiments.record" and (slugs := [word for word in words if not word.startswith("-")]):
        chosen(slugs, EXPERIMENTS)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_make_target_is_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    said = {
        word
        for block in blocks(page)
        if block.language == "console"
        for word in re.findall(r"^\$ make ([a-z-]+)", block.body, re.MULTILINE)
    }
    assert said <= targets


# --- links


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    prose = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = unquote(target).partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{named(page)} links to {target}"
        if heading and found.suffix == ".md":
            assert heading in anchors(found), f"{named(page)} links to {target}"


# --- the workflow


def test_the_workflow_installs_what_this_package_asks_for() -> None:
    (workflow,) = (block for block in BLOCKS if (block.file or "").startswith(".github/workflows/"))
    steps = yaml.safe_load(workflow.body)["jobs"]["losses"]["steps"]
    words = [word for step in steps for word in shlex.split(step.get("run", ""))]
    torch, lab = (Requirement(word) for word in words if word.startswith(("torch", "likelihood-lab")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert str(torch) in [str(Requirement(line)) for line in project["dependencies"]]
    assert (lab.name, lab.extras) == (project["name"], set())


# --- the argument in two languages

ENGLISH, CHINESE = ROOT / "docs" / "argument.md", ROOT / "README.zh-CN.md"
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[-+]?\d[\d.]*(?: \d{3})*(?:e-?\d+)?(?![A-Za-z0-9])")


def sections(page: Path) -> list[str]:
    return re.split(r"^#+ .*$", page.read_text(encoding="utf-8").replace("−", "-"), flags=re.MULTILINE)


def numbers(section: str) -> Counter[str]:
    prose = re.sub(r"\]\([^)]*\)", "]", FENCED.sub("", section))
    return Counter(number.rstrip(".") for number in NUMBER.findall(prose))


def test_the_argument_in_both_languages_has_the_same_code() -> None:
    """Comments are translated; every other line of every block is the same."""
    english, chinese = (
        [(block.language, re.sub(r" *#.*", "", block.body)) for block in blocks(page)] for page in (ENGLISH, CHINESE)
    )
    assert english == chinese
    assert len(english) == 10


def test_the_argument_in_both_languages_has_the_same_numbers() -> None:
    english, chinese = ([numbers(section) for section in sections(page)] for page in (ENGLISH, CHINESE))
    for number, (here, there) in enumerate(zip(english, chinese, strict=True)):
        assert here == there, (number, here - there, there - here)
    assert english[4]["0.69"] == 1
