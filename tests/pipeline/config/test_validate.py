"""The schema and the checks of a composed configuration, and the message of every refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from pipeline.config import schema as conf
from pipeline.config.targets import check_call, locate
from pipeline.config.validate import chosen_files, validate
from tests.trials import ROOT, usage_error

Refusal = Callable[[dict[str, Any]], str]


def compose_train(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose_train()


@pytest.fixture
def refusal(composed: DictConfig) -> Refusal:
    """Return a function that gives the error of the default configuration with these values, by dotted key."""

    def of(values: dict[str, Any]) -> str:
        cfg = copy.deepcopy(composed)
        with open_dict(cfg):
            for key, value in values.items():
                OmegaConf.update(cfg, key, value, merge=False, force_add=True)
        return usage_error(lambda: validate(cfg))

    return of


def test_the_shipped_configuration_passes(composed: DictConfig) -> None:
    validate(composed)


@pytest.mark.parametrize("experiment", [file.stem for file in (conf.CONF / "experiment").glob("*.yaml")])
def test_every_shipped_experiment_passes(experiment: str) -> None:
    cfg = compose_train(f"experiment={experiment}")
    validate(cfg)
    assert cfg.tracking.experiment == experiment  # one name everywhere
    assert (ROOT / "experiments" / experiment / "README.md").exists()


def test_a_loss_file_declares_one_loss_under_its_own_name() -> None:
    for file in (conf.CONF / "loss").glob("*.yaml"):
        assert list(OmegaConf.load(file)) == [file.stem]


def test_the_keys_of_a_training() -> None:
    assert list(conf.TrainConf.__dataclass_fields__) == [
        "loss", "model", "dataset", "optimizer", "trainer", "tracking", "seed", "share", "reference", "epochs",
        "batch_size", "precision", "schedule", "warmup_steps", "clip_norm", "about", "expect", "protocol", "audit",
    ]  # fmt: skip


# --- seeds, reference, expectations


def test_seed_default_is_zero_and_largest_is_accepted(composed: DictConfig) -> None:
    assert conf.seeds_of(conf.plain(composed)) == [0]
    assert conf.seeds_of({"seed": [0, conf.MAX_SEED]}) == [0, 2**32 - 1]


@pytest.mark.parametrize(("losses", "reference"), [("nll ce kl", "ce"), ("kl nll", "kl")])
def test_reference_is_ce_or_else_the_first(losses: str, reference: str) -> None:
    assert conf.reference_of({"loss": dict.fromkeys(losses.split()), "reference": None}) == reference


def test_one_expected_word_applies_to_every_candidate() -> None:
    losses = dict.fromkeys(["nll", "ce", "kl"])
    asked = {"loss": losses, "reference": None, "expect": "same"}
    assert conf.expectations_of(asked) == {"nll": "same", "kl": "same"}
    assert conf.expectations_of({**asked, "expect": None}) == {}
    alone = {**asked, "loss": {"ce": {}}}
    assert "expect='same', but ce is the only loss" in usage_error(lambda: conf.expectations_of(alone))


# --- keys, numbers, margins


class NeedsWeight(torch.nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()


CE = "torch.nn.CrossEntropyLoss"
BRIER = "likelihood_lab.categorical.losses.brier_score"


def loss(target: str, args: object = ("logits",), **keywords: object) -> dict[str, Any]:
    return {"fn": {"_target_": target, **keywords}, "args": list(args) if isinstance(args, tuple) else args}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("reference", "brier", "reference=brier is not among the chosen losses, nll, ce, kl"),
        ("nonsense", 1, "unknown key 'nonsense'; the keys are: loss, model"),
        ("epoch", 1, "unknown key 'epoch' (did you mean 'epochs'?)"),
        ("trainer.thread", 1, "unknown key 'trainer.thread' (did you mean 'threads'?); trainer takes: acc"),
        ("tracking.url", "x", "unknown key 'tracking.url' (did you mean 'uri'?); tracking takes: enabled"),
        ("tracking.uri", "http://me:secret@x", "tracking.uri=http://x came with a password; give it by MLFLOW_TRACK"),
        ("model.hiden", 3, "unknown key 'model.hiden' (did you mean 'hidden'?); pipeline.models.mlp takes"),
        ("dataset.seed", 3, "unknown key 'dataset.seed' (did you mean 'data_seed'?)"),
        ("optimizer.momentun", 3, "unknown key 'optimizer.momentun' (did you mean 'momentum'?)"),
        ("loss.nll.arg", ["logits"], "unknown key 'loss.nll.arg' (did you mean 'args'?)"),
        ("model.dropout", "much", "model.dropout='much': input should be a valid number"),
        ("model.hidden", [1.5], "model.hidden=[1.5]: input should be a valid integer"),
        ("model.hidden", "3", "model.hidden='3': input should be"),
        ("optimizer.lr", "fast", "optimizer.lr='fast': input should be a valid number"),
        ("dataset._target_", "digits", "dataset._target_='digits'; give a dotted path such as"),
        ("epochs", 0, "epochs=0; it must be at least 1"),
        ("batch_size", -4, "batch_size=-4; it must be at least 1"),
        ("warmup_steps", -1, "warmup_steps=-1; it must be at least 0"),
        ("protocol.max_seeds", 1, "protocol.max_seeds=1; it must be at least 2"),
        ("protocol.looks", 0, "protocol.looks=0; it must be at least 1"),
        ("protocol.max_seeds", 40, "protocol.max_seeds=40 adds seeds at further looks"),
        ("trainer.threads", 0, "trainer.threads=0; it must be at least 1"),
        ("trainer.tile", 0, "trainer.tile=0; it must be at least 1"),
        ("protocol.alpha", 0.0, "protocol.alpha=0.0; it must lie between 0 and 0.5"),
        ("protocol.alpha", 0.5, "protocol.alpha=0.5; it must lie between 0 and 0.5"),
        ("protocol.alpha", float("nan"), "protocol.alpha=nan; it must lie"),
        ("clip_norm", 0.0, "clip_norm=0.0; give a positive number, or null"),
        ("clip_norm", float("inf"), "clip_norm=inf; give a positive number"),
        ("dataset.margins", {"nll": -0.1}, "dataset.margins.nll=-0.1; a margin is a positive number"),
        ("dataset.margins", {"nll": True}, "dataset.margins.nll=True; a margin is a positive number"),
        ("dataset.margins", {"auc": 0.1}, "dataset.margins names 'auc'; the metrics are nll, brier, acc"),
        ("dataset.margins", 0.1, "dataset.margins=0.1; give a mapping such as '{nll: 0.05}'"),
        ("dataset.primary", ["ece"], "dataset.primary names 'ece', which has no margin"),
        ("dataset.primary", ["f1"], "dataset.primary names 'f1'; the metrics are"),
        ("dataset.primary", "nll", "dataset.primary='nll'; give a list"),
        ("loss", {}, "no loss is chosen; give for example 'loss=[nll,ce,kl]'"),
        ("model", {}, "model declares no _target_"),
        ("seed", [0, 1, 0, 2, 1], "seed repeats 0, 1"),
        ("seed", -1, "seed=-1 is not an integer from 0 to 4294967295"),
        ("seed", [0, -3], "seed=-3 is not an integer"),
        ("seed", 1.0, "seed=1.0 is not an integer"),
        ("seed", True, "seed=True is not an integer"),
        ("seed", None, "seed=None is not an integer"),
        ("seed", 2**32, "seed=4294967296 is not an integer"),
        ("seed", "abc", "seed='abc' is not an integer"),
        ("seed", [[0, 1]], "seed=[0, 1] is not an integer"),
        ("seed", {"a": 1}, "is not an integer"),
        ("seed", [], "seed is empty; give an integer or a list"),
        ("expect", {"nlll": "same"}, "expect names 'nlll'; the chosen candidates are nll, kl"),
        ("expect", {"ce": "same"}, "expect names 'ce'"),
        ("expect", "smae", "'smae' is no verdict; the words are same, identical"),
        ("expect", {"nll": "sames"}, "expect: nll 'sames' is no verdict"),
        ("expect", {"nll": None}, "expect: nll None is no verdict"),
        ("expect", ["same"], "expect=['same']; give a word such as same"),
        ("expect", True, "expect=True; give a word such as same"),
        ("loss.mine", {"args": ["logits", "labels"]}, "loss.mine.fn is missing"),
        ("loss.mine", {"fn": {"_target_": CE}}, "loss.mine.args is missing"),
        ("loss.mine", loss(CE, []), "loss.mine.args is missing"),
        ("loss.mine", loss(CE, "logits"), "give a list: [logits]"),
        ("loss.mine", loss(CE, ["logit"]), "loss.mine.args names 'logit' (did you mean 'logits'?); it is a list of lo"),
        ("loss.mine", {"fn": {"reduction": "sum"}, "args": ["logits"]}, "loss.mine.fn declares no _target_"),
        ("loss.mine", {"fn": CE, "args": ["logits"]}, "loss.mine.fn declares no _target_"),
        ("loss.mine", CE, "loss.mine is not a mapping"),
        ("loss.mine", loss(CE[:-1]), "torch.nn has no callable 'CrossEntropyLos' (did you mean 'CrossEntropyLoss'?)"),
        (
            "loss.mine",
            loss("no_such.loss"),
            "loss.mine.fn._target_: cannot import no_such (No module named",
        ),
        ("loss.mine", loss(CE, reducton="sum"), "unknown key 'loss.mine.fn.reducton' (did you mean 'reduction'?)"),
        ("loss.mine", loss(f"{__name__}.NeedsWeight"), "loss.mine.fn.weight is missing"),
        ("loss.mine", loss(BRIER), f"{BRIER} is a function; add `_partial_: true`"),
        ("loss.mine", loss(CE, _partial_=True), f"{CE} is a class, which makes the loss; remove `_partial_`"),
    ],
)
def test_a_wrong_key_or_value_is_refused(key: str, value: object, reason: str, refusal: Refusal) -> None:
    assert reason in refusal({key: value})


def test_a_missing_key_is_refused(composed: DictConfig) -> None:
    cfg = OmegaConf.create({key: value for key, value in composed.items_ex(resolve=False) if key != "epochs"})
    assert "epochs is missing" in usage_error(lambda: validate(cfg))


def pictures(root: str, size: int = 8) -> None: ...


def test_a_value_left_to_the_user_is_required(refusal: Refusal) -> None:
    target = f"{__name__}.pictures"
    left_open = {"dataset": {"_target_": target, "root": "???"}}
    assert "dataset.root is not set; give it on the command line: dataset.root=" in refusal(left_open)
    assert f"dataset.root is missing: {target} needs it" in refusal({"dataset": {"_target_": target}})


# --- losses


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def loss(:\n", "importing {module} failed: SyntaxError"),
        ("import no_such_library\n", "cannot import {module} (No module named 'no_such_library')"),
        (
            "from pipeline.datasets import make_dataset\n",
            "{module} imports pipeline.datasets, which is now pipeline.data; change the import",
        ),
    ],
    ids=["torn", "needy", "dated"],
)
def test_a_module_that_cannot_be_imported_is_named(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    module = f"{request.node.callspec.id}_module"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{module}.py").write_text(code)
    assert message.format(module=module) in usage_error(lambda: locate("loss.mine.fn", f"{module}.loss"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pipeline.losses.brier_score", BRIER),
        ("pipeline.datasets.make_dataset", "pipeline.data.make_dataset"),
        ("pipeline.loaders.digits", "pipeline.data.loaders.digits"),
        ("pipeline.pictures.image_folder", "pipeline.data.image_folder.image_folder"),
        ("pipeline.soft_labels.teacher", "pipeline.data.soft_labels.teacher"),
    ],
)
def test_a_target_of_an_earlier_version_gets_its_new_name(old: str, new: str) -> None:
    message = f"loss.mine.fn._target_={old}: that is now {new}; change"
    assert message in usage_error(lambda: locate("loss.mine.fn", old))
    assert callable(locate("loss.mine.fn", new))


def test_a_method_of_a_class_can_be_named() -> None:
    assert locate("model", "torch.nn.Linear.extra_repr") is torch.nn.Linear.extra_repr


def test_a_list_is_a_tuple_and_an_integer_a_float() -> None:
    check_call("optimizer", {"_target_": "torch.optim.Adam", "betas": [0, 0.999], "lr": 1}, ["params"])


DECLARED = f"{{fn: {{_target_: {CE}}}, args: [logits, labels]}}"


@contextmanager
def job(*overrides: str) -> Iterator[DictConfig]:
    """Yield the configuration of a job, with Hydra's global state as while the job runs."""
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        try:
            yield cfg
        finally:
            HydraConfig.instance().cfg = None


@pytest.mark.parametrize(
    ("losses", "file", "text", "message"),
    [
        ("ce,nll,mine", "mine", f"nll: {DECLARED}", "mine.yaml declares nll; give it the single key mine"),
        (
            "ce,nll,mine",
            "mine",
            f"mine: {DECLARED}\nnll: 1",
            "mine.yaml declares mine, nll; give it the sin",
        ),
        ("ce,nll,mine", "mine", DECLARED, "mine.yaml declares fn, args; give it the single key mine"),
        ("ce,nll", "nll", f"nll: {DECLARED}", "nll.yaml is hidden by "),
        ("ce,nll,ce", "mine", "", "loss=ce is chosen more than once"),
    ],
    ids=["the key of another loss", "two keys", "no name", "hidden", "chosen twice"],
)
def test_a_wrong_loss_file_is_refused(losses: str, file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / f"{file}.yaml").write_text(text)
    with job(f"loss=[{losses}]", f"hydra.searchpath=[file://{tmp_path}]") as cfg:
        assert message in usage_error(lambda: validate(cfg))


def test_chosen_files_are_those_of_the_experiment() -> None:
    assert chosen_files("loss") == {}
    with job("experiment=textbook_spellings") as cfg:
        assert list(chosen_files("loss")) == list(cfg.loss)
        validate(cfg)


# --- names


def test_trial_name_depends_on_the_configuration_alone(composed: DictConfig) -> None:
    config = conf.plain(composed)
    name = conf.trial_name(config)
    assert name.startswith("digits-mlp-")
    assert conf.trial_name({**config, "seed": [5], "loss": {}, "expect": "same"}) == name
    assert conf.trial_name({**config, "dataset": {**config["dataset"], "margins": {"nll": 9.0}}}) == name
    assert conf.trial_name({**config, "epochs": 31}) != name


def test_vary_is_in_the_trial_name_unless_default(composed: DictConfig) -> None:
    config = conf.plain(composed)
    assert config["protocol"]["vary"] == "all"
    assert "vary" not in conf.identity(config)
    names = [conf.trial_name({**config, "protocol": {**config["protocol"], "vary": vary.value}}) for vary in conf.Vary]
    assert len(set(names)) == len(names)
