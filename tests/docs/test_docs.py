"""Check the documentation: its code runs or compiles, its commands compose, its links lead somewhere."""

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
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[-+]?\d[\d.]*(?: \d{3})*(?:e-?\d+)?(?![A-Za-z0-9])")
OWN = ("my_", "conf/experiment/", "experiments/")  # files that a reader of docs/extending.md adds to the checkout
PLACEHOLDERS = ("OPTIMIZER", "TRIAL")  # words that a command leaves to the reader
WRONG = "test_wrong.py"  # docs/pytest.md says that this file fails


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    body: str

    @property
    def file(self) -> str | None:
        """Path in the block's first line, if there is one."""
        head = HEAD.match(self.body)
        return head["path"] if head else None


def read_blocks(page: Path) -> list[Block]:
    return [Block(page, found["language"], found["body"]) for found in FENCED.finditer(page.read_text("utf-8"))]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
TESTED = {block.file: block for block in PYTHON if block.page.name == "pytest.md" and block.file is not None}


@dataclass(frozen=True)
class Command:
    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{page_id(self.page)}: {shlex.join(self.words)}"


def read_commands() -> Iterator[Command]:
    """Yield each command after `$ python -m` once, with continued lines joined."""
    for block in BLOCKS:
        for line in re.sub(r"\\\n\s*", "", block.body).splitlines() if block.language == "console" else []:
            words = shlex.split(line, comments=True) if line.startswith("$ ") else []
            starts = [i for i, word in enumerate(words) if word.rpartition("/")[2] == "python"]
            if starts and words[starts[0] + 1 : starts[0] + 2] == ["-m"]:
                yield Command(block.page, tuple(words[starts[0] + 2 :]))


COMMANDS = list({command.words: command for command in read_commands()}.values())
COMPOSED = [command for command in COMMANDS if command.words[0] in ("pipeline.train", "pipeline.audit")]
OTHERS = [c for c in COMMANDS if c not in COMPOSED and c.words[0].startswith(("pipeline.", "experiments."))]


# --- code


def test_pages_with_code_and_commands_are_found() -> None:
    assert len(PAGES) > 10
    assert {block.page.name for block in PYTHON} >= {"README.md", "extending.md", "pytest.md", "argument.md"}
    assert {command.page.parent.name for command in COMPOSED} >= {"docs", "equivalence", "textbook_spellings"}


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"{page_id(block.page)}:{block.body.splitlines()[0]}")
def test_python_block_compiles(block: Block) -> None:
    compile(block.body, page_id(block.page), "exec")


@pytest.mark.parametrize(("language", "load"), [("yaml", yaml.safe_load), ("json", json.loads)])
def test_data_block_parses(language: str, load: Callable[[str], Any]) -> None:
    bodies = [block.body for block in BLOCKS if block.language == language]
    assert bodies
    assert all(map(load, bodies))


def load_tests(file: str) -> list[Callable[..., None]]:
    """Return the test functions of a file that docs/pytest.md shows."""
    namespace: dict[str, Any] = {}
    exec(compile(TESTED[file].body, file, "exec"), namespace)  # noqa: S102 - the documentation's own
    return [value for name, value in namespace.items() if name.startswith("test_")]


@pytest.mark.parametrize("file", sorted(set(TESTED) - {WRONG}))
def test_documented_tests_pass(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_two_classes(*losses: Any, **settings: Any) -> None:
        """Test that the call is right, on a small grid."""
        assert_same_loss(*losses, **settings, num_classes=(2,))

    monkeypatch.setattr(likelihood_lab, "assert_same_loss", with_two_classes)
    tests = load_tests(file)
    assert tests
    for test in tests:
        test(*[with_two_classes for name in inspect.signature(test).parameters if name == "assert_same_loss"])


def test_documented_failure_has_the_shown_message() -> None:
    (shown,) = (block.body for block in read_blocks(ROOT / "docs" / "pytest.md") if block.body.startswith("E   "))
    (test,) = load_tests(WRONG)
    with pytest.raises(AssertionError) as failed:
        test()
    lines = [line.strip() for line in shown.removeprefix("E   AssertionError: ").splitlines()]
    assert str(failed.value).splitlines() == lines


# --- commands


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files of docs/extending.md and the README where a reader puts them."""
    folder = tmp_path_factory.mktemp("reader")
    for block in BLOCKS:
        if block.file and block.file.startswith(OWN):
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body, encoding="utf-8")
    return folder


def jobs(overrides: list[str]) -> list[list[str]]:
    """Return the smallest set of a sweep's jobs in which each swept value occurs."""
    sweeper = StackedSweeper()
    choices = [sweeper.choices(override) for override in OverridesParser.create().parse_overrides(overrides)]
    count = max(map(len, choices), default=1)
    return [[values[min(k, len(values) - 1)] for values in choices] for k in range(count)]


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    """Initialise Hydra once, so that it reads each configuration file once."""
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        yield


@contextmanager
def composed(command: Command, reader: Path) -> Iterator[list[DictConfig]]:
    """Yield the configuration of each job. Hydra's global state is that of the last job."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("overrides", nargs="*")
    parsed = parser.parse_intermixed_args([word for word in command.words[1:] if word not in PLACEHOLDERS])
    searched = [reader / path if (reader / path).is_dir() else ROOT / path for path in parsed.config_dir]
    assert all(path.is_dir() for path in searched), f"{command}: no such configuration folder"
    if command.page.name == "extending.md":
        searched.append(reader / "conf")
    search = [f"hydra.searchpath=[{','.join(f'file://{path}' for path in searched)}]"] if searched else []
    name = command.words[0].removeprefix("pipeline.")
    try:
        configs = [compose(name, [*job, *search], return_hydra_config=True) for job in jobs(parsed.overrides)]
        HydraConfig.instance().set_config(configs[-1])
        yield configs
    finally:
        HydraConfig.instance().cfg = None


@pytest.mark.parametrize("command", COMPOSED, ids=str)
def test_command_composes_and_validates(
    command: Command, readers_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(readers_folder)
    with composed(command, readers_folder) as configs:
        for cfg in configs:
            if "my_package" in str(cfg.loss):  # stands for the reader's own
                continue
            (validate if command.words[0] == "pipeline.train" else validate_audit)(cfg)
            for loss, declared in cfg.loss.items():  # an audit checks only their form before it runs
                validate_loss(f"loss.{loss}", OmegaConf.to_container(declared))


@pytest.mark.parametrize("wrong", ["epoch=1", "loss=[ce,no_such_loss]", "model=mlp,no_such_model", "--no-such"])
def test_wrong_command_is_detected(wrong: str, readers_folder: Path) -> None:
    command = Command(ROOT / "README.md", ("pipeline.train", wrong))
    with pytest.raises((HydraException, argparse.ArgumentError, SystemExit)), composed(command, readers_folder):
        pass


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_other_module_exists(command: Command) -> None:
    module, *words = command.words
    assert importlib.util.find_spec(module) is not None
    if module == "experiments.record" and (slugs := [word for word in words if not word.startswith("-")]):
        chosen(slugs, EXPERIMENTS)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    bodies = "\n".join(block.body for block in BLOCKS if block.language == "console")
    used = set(re.findall(r"^\$ make ([a-z-]+)", bodies, re.MULTILINE))
    assert {"equivalence", "test"} <= used <= targets


# --- links


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=page_id)
def test_relative_links_resolve(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text("utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = unquote(target).partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page_id(page)} links to {target}"
        if heading and linked.suffix == ".md":
            assert heading in anchors(linked), f"{page_id(page)} links to {target}"


# --- the workflow


def test_workflow_installs_the_declared_requirements() -> None:
    (workflow,) = (block for block in BLOCKS if (block.file or "").startswith(".github/workflows/"))
    steps = yaml.safe_load(workflow.body)["jobs"]["losses"]["steps"]
    words = [word for step in steps for word in shlex.split(step.get("run", ""))]
    torch, lab = (Requirement(word) for word in words if word.startswith(("torch", "likelihood-lab")))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert str(torch) in [str(Requirement(line)) for line in project["dependencies"]]
    assert (lab.name, lab.extras) == (project["name"], set())


# --- the argument in two languages


ARGUMENTS = (ROOT / "docs" / "argument.md", ROOT / "README.zh-CN.md")


def test_argument_has_the_same_code_in_both_languages() -> None:
    """Comments are translated; every other line of every block is the same."""
    english, chinese = (
        [(block.language, re.sub(r" *#.*", "", block.body)) for block in read_blocks(page)] for page in ARGUMENTS
    )
    assert english == chinese
    assert len(english) == 10


def test_argument_has_the_same_numbers_in_both_languages() -> None:
    def count_numbers(section: str) -> Counter[str]:
        return Counter(number.rstrip(".") for number in NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", section)))

    def sections(page: Path) -> list[str]:
        text = FENCED.sub("", page.read_text("utf-8")).replace("\N{MINUS SIGN}", "-")
        return re.split(r"^#+ .*$", text, flags=re.MULTILINE)

    english, chinese = (list(map(count_numbers, sections(page))) for page in ARGUMENTS)
    assert english == chinese
    assert sum(map(len, english)) > 100
