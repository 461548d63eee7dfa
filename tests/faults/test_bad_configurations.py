"""Wrong configurations, drawn from the schema: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.config import schema as conf
from pipeline.config.validate import LIMITS
from tests.trials import command_error

Overrides = list[str]
GROUPS = ("loss", "model", "dataset", "optimizer", "trainer", "tracking", "protocol", "experiment")
DECLARED = ("model", "dataset", "optimizer")  # groups whose files declare a call
UNSET = ("???", "'${nowhere}'", "'${oc.env:NO_SUCH_VARIABLE}'")
MISFITS: dict[type, tuple[str, ...]] = {
    int: ("x", "1.5", "[1]", "{a: 1}", "nan", "''"),
    float: ("x", "true", "[0.5]", "{a: 1}", "''"),
    bool: ("maybe", "1.5", "[true]", "{a: 1}"),
    str: ("[a]", "{a: 1}"),
    list: ("x", "3", "{a: 1}", "true"),
    dict: ("x", "3", "[a]", "true"),
}
ANYTHING = {
    "seed": ("-1", "1.5", "[]", "[0,0]", "x", "{a: 1}", str(2**32), "null", "[true]", "[[0]]"),
    "share": ("x", "0", "1.5", "true", "{a: 1}", "[x]", "[-1]", "[99]", "[true]", "[[0]]"),
    "expect": ("x", "3", "{ce: same}", "{nobody: same}", "{nll: x}", "[same]", "true"),
}  # the schema allows any value; `pipeline.config.schema` checks them
IMPOSSIBLE: list[Overrides] = [
    ["reference=brier"], ["loss=[ce]", "expect=same"], ["loss=[ce,nll,ce]"], ["protocol.max_seeds=40"],
    ["+rank_test=1"],    ["protocol.alpha=0"], ["protocol.alpha=0.5"],
    ["protocol.alpha=nan"], ["clip_norm=0"], ["clip_norm=inf"], ["batch_size=1138"],
    ["dataset.margins={accuracy: 0.001}"], ["dataset.margins.nll=-1"], ["dataset.margins.nll=nan"],
    ["dataset.primary=[kl_truth]", "dataset.margins=null"], ["dataset.primary=[ece]"], ["dataset.primary=[f1]"],
    ["dataset.dose=-1"], ["dataset.dose=1e9"], ["dataset.data_seed=-1"], ["dataset.data_seed={}"], ["model.dropout=2"],
    ["model.hidden=[0]"], ["model.hidden=[-3]"], ["optimizer.lr=-1"], ["optimizer.lr=nan"], [f"optimizer.lr={10**23}"],
    ["optimizer=adam", "+optimizer.betas=[0.9,1.0]"], ["optimizer._target_=torch.optim.LBFGS"],
    ["model=cnn", "model.channels=[1,1,1,1,1,1]"], ["model=cnn", "trainer.engine=fold", "+model.no=1"],
    ["dataset=image_folder"], ["dataset=image_folder", "dataset.root=/nowhere"],
    ["dataset=image_folder", "dataset.root=~nobody_at_all"], ["dataset=teacher", "dataset.sharpness=inf"],
    ["dataset=teacher", f"dataset.train={10**12}"], ["dataset=teacher", "dataset.val=0"],
    ["+loss.ce.lr_scale=0"], ["+loss.ce.fn.label_smoothing=2"], ["+loss.ce.fn.reduction=none"],
    ["loss.ce.args=[labels,logits]"], ["loss.ce.args=[weight,labels]"], ["~epochs"], ["~loss.ce.fn"], ["~model"],
    ["model=[null]"], ["model=3"], ["loss=[3]"], ["loss=null"], ["seed=0,1"], ["epochs"], ["epochs=[1"], ["=3"],
]  # fmt: skip


def misfits(hint: Any) -> tuple[str, ...]:
    """Return texts that cannot be a value of this type on the command line."""
    kinds = typing.get_args(hint) or (hint,)
    kind = kinds[0]
    wrong = ("no_such_word", "3", "[x]", "{a: 1}") if issubclass(kind, Enum) else MISFITS[kind]
    return (*wrong, *UNSET, *(() if type(None) in kinds else ("null",)))


def schema_fields() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every field of the schema except the groups, with its wrong values."""
    parts = {"trainer.": conf.TrainerConf, "tracking.": conf.TrackingConf, "protocol.": conf.ProtocolConf}
    for prefix, schema in {"": conf.TrainConf, **parts}.items():
        for name, hint in typing.get_type_hints(schema).items():
            if name in ANYTHING:
                yield name, (*ANYTHING[name], *UNSET)
            elif prefix or name not in GROUPS:
                yield prefix + name, misfits(hint)


def file_keywords() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield every keyword of every shipped model, dataset and optimizer: its file's override, key, wrong values."""
    for group in DECLARED:
        for file in sorted((conf.CONF / group).glob("*.yaml")):
            for key, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
                if value is not None and key not in ("_target_", *conf.DATASET_PROTOCOL):
                    yield f"{group}={file.stem}", f"{group}.{key}", MISFITS[type(value)]


FIELDS, KEYWORDS = list(schema_fields()), list(file_keywords())
words = st.from_regex(r"[a-z]{3,8}_[a-z]{3,8}", fullmatch=True)


@st.composite
def wrong_value(draw: st.DrawFn) -> Overrides:
    key, wrong = draw(st.sampled_from(FIELDS))
    return [f"{key}={draw(st.sampled_from(wrong))}"]


@st.composite
def wrong_keyword(draw: st.DrawFn) -> Overrides:
    choice, key, wrong = draw(st.sampled_from(KEYWORDS))
    return [choice, f"{key}={draw(st.sampled_from(wrong))}"]


@st.composite
def out_of_range(draw: st.DrawFn) -> Overrides:
    key, (least, most) = draw(st.sampled_from(list(LIMITS.items())))
    return [f"{key}={draw(st.integers(max_value=least - 1) | st.integers(min_value=most + 1))}"]


@st.composite
def unknown(draw: st.DrawFn) -> Overrides:
    """Draw a key, an option or a target that does not exist."""
    word = draw(words)
    prefixes = ("", *(f"{group}." for group in GROUPS if group != "experiment"), "loss.ce.", "loss.ce.fn.")
    return [
        draw(
            st.sampled_from([f"{mark}{prefix}{word}=1" for mark in ("", "+") for prefix in prefixes])
            | st.sampled_from([f"{group}={word}" for group in GROUPS])
            | st.sampled_from([f"{group}._target_={path}" for group in DECLARED for path in (word, f"{word}.x")])
            | st.sampled_from([f"loss.ce.fn._target_={path}" for path in (word, f"torch.nn.{word}")])
        )
    ]


harmless = st.sampled_from([[], ["epochs=2"], ["seed=[3,4]"], ["batch_size=32"], ["trainer=cpu"], ["about=outcome"]])
bad = wrong_value() | wrong_keyword() | out_of_range() | unknown() | st.sampled_from(IMPOSSIBLE)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


def check(folder: Path, wrong: Overrides, harmless: Overrides) -> None:
    keys = {line.partition("=")[0] for line in wrong}
    line = command_error(folder, *(line for line in harmless if line.partition("=")[0] not in keys), *wrong)
    assert len(line) < 500, line
    assert "Error:" not in line, f"the name of an exception tells a user nothing: {line}"


quiet: dict[str, Any] = {
    "deadline": None, "derandomize": True, "database": None, "suppress_health_check": [HealthCheck.too_slow],
    "phases": [Phase.generate],
}  # fmt: skip


@settings(max_examples=25, **quiet)
@given(wrong=bad, harmless=harmless)
def test_a_bad_configuration_is_one_line(empty: Path, wrong: Overrides, harmless: Overrides) -> None:
    check(empty, wrong, harmless)


@pytest.mark.faults
@settings(max_examples=200, **quiet)
@given(wrong=bad, harmless=harmless)
def test_200_bad_configurations_are_one_line_each(empty: Path, wrong: Overrides, harmless: Overrides) -> None:
    check(empty, wrong, harmless)


@pytest.mark.faults
@pytest.mark.parametrize("wrong", [*IMPOSSIBLE, *([f"{key}={wrong[0]}"] for key, wrong in FIELDS)], ids=" ".join)
def test_every_field_and_combination_is_refused(empty: Path, wrong: Overrides) -> None:
    check(empty, wrong, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(empty: Path) -> None:
    assert "trainer=gpu, but torch sees no CUDA GPU here" in command_error(empty, "trainer=gpu")
