"""The schema of every configuration group, and the checks that Hydra itself does not make."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UsageError, first_line

MAX_SEED = 2**32 - 1  # what numpy, torch and scikit-learn all accept
ROOT = Path(__file__).resolve().parent.parent
CONF = Path(__file__).parent / "conf" if (Path(__file__).parent / "conf").is_dir() else ROOT / "conf"


class Accelerator(Enum):
    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class Engine(Enum):
    auto = "auto"
    fold = "fold"
    loop = "loop"


class Precision(Enum):
    float64 = "float64"
    float32 = "float32"
    bf16_mixed = "bf16_mixed"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"


class About(Enum):
    objective = "objective"
    outcome = "outcome"


@dataclass
class LossConf:
    fn: dict[str, Any] = field(default_factory=dict)  # _target_ and its keywords; `_partial_: true` for a function
    args: list[str] = field(default_factory=list)  # what it receives, in its own order


@dataclass
class TrainerConf:
    accelerator: Accelerator = Accelerator.auto
    engine: Engine = Engine.auto
    tile: int | None = None  # replicas trained at once; null: a static rule
    threads: int = 1
    inner_steps: int = 11  # optimizer steps in one Lightning training_step
    progress: bool = True


@dataclass
class TrackingConf:
    enabled: bool = True
    uri: str | None = None
    experiment: str = "likelihood-lab"


@dataclass
class TrainConf:
    loss: dict[str, LossConf] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    tracking: TrackingConf = field(default_factory=TrackingConf)
    seed: Any = 0  # an integer or a list of integers
    reference: str | None = None  # null: ce, or the first loss where ce is not chosen
    epochs: int = 30
    batch_size: int = 64
    precision: Precision = Precision.float32
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    clip_norm: float | None = None
    about: About = About.objective
    expect: Any = None  # same, or {loss: word}
    alpha: float = 0.05
    max_seeds: int = 100


# What names a trial: everything that shapes its numbers, and neither losses nor seeds, which may be added later.
IDENTITY = (
    "model", "dataset", "optimizer", "epochs", "batch_size", "precision", "schedule", "warmup_steps", "clip_norm",
)  # fmt: skip
# Keys of conf/dataset/*.yaml that the loader does not receive.
DATASET_PROTOCOL = ("margins", "primary")


def register() -> None:
    """Make the schema and the resolver known to Hydra; safe to call again."""
    ConfigStore.instance().store(name="schema", node=TrainConf)
    OmegaConf.register_new_resolver("trial_name", _trial_name, replace=True)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as ordinary Python values."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plain configuration that names its trial; margins belong to the verdict, not to the numbers."""
    kept = {key: config[key] for key in IDENTITY}
    kept["dataset"] = {k: v for k, v in config["dataset"].items() if k not in DATASET_PROTOCOL}
    return kept


def digest(value: Any) -> str:
    """SHA-256 of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def short_name(target: str) -> str:
    """The last part of a dotted path: `pipeline.models.mlp` is mlp."""
    return target.rpartition(".")[2]


def trial_name(config: Mapping[str, Any]) -> str:
    """A stable folder name made from the configuration, such as digits-mlp-1f2e3d4c."""
    words = [short_name(str(config[group].get("_target_", group))) for group in ("dataset", "model")]
    return "-".join([*words, digest(identity(config))[:8]])


def _trial_name(*, _root_: DictConfig) -> str:
    named = {key: _root_[key] for key in IDENTITY}
    return trial_name(plain(OmegaConf.create({k: v for k, v in named.items()})))


# --- checks -----------------------------------------------------------------------------------------------------


def check(cfg: DictConfig, choices: Any = None) -> None:
    """Refuse a composed configuration that could not be trained, in one line, before anything is written.

    Args:
        choices: Hydra's choices of config files, where `cfg` does not hold them itself.

    Raises:
        UsageError: always with the key, the value and what to give instead.
    """
    choices = choices or OmegaConf.select(cfg, "hydra.runtime.choices", default=None)
    try:
        config = plain(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]))
    except OmegaConfBaseException as error:
        raise UsageError(first_line(error)) from error
    _check_keys(config)
    _check_losses(config["loss"], _chosen_losses(choices))
    seeds_of(config)
    _check_numbers(config)
    reference_of(config)
    expectations_of(config)
    for group, given in GIVEN_BY_PIPELINE.items():
        check_call(group, config[group], given)
    _check_margins(config["dataset"])


# What the pipeline adds when it calls each group's target.
GIVEN_BY_PIPELINE = {
    "model": ("input_shape", "num_classes"),
    "dataset": DATASET_PROTOCOL,
    "optimizer": ("params",),
}


def _check_keys(config: Mapping[str, Any]) -> None:
    """Hydra lets `+key=value` add any key; nothing here reads an unknown one."""
    known = set(TrainConf.__dataclass_fields__)
    for key in config:
        if key not in known:
            raise UsageError(f"unknown key '{key}'{_did_you_mean(key, known)}; the keys are: {', '.join(sorted(known))}")
    for group, schema in (("trainer", TrainerConf), ("tracking", TrackingConf)):
        fields = set(schema.__dataclass_fields__)
        for key in set(config[group]) - fields:
            raise UsageError(f"unknown key '{group}.{key}'{_did_you_mean(key, fields)}; it takes: {', '.join(fields)}")


def _did_you_mean(word: str, known: Sequence[str] | set[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _chosen_losses(choices: Any) -> list[str] | None:
    chosen = None if choices is None else choices.get("loss")
    if chosen is None:
        return None
    return [str(name) for name in ([chosen] if isinstance(chosen, str) else chosen)]


def _check_losses(losses: Mapping[str, Any], chosen: list[str] | None) -> None:
    if chosen is not None and list(losses) != list(dict.fromkeys(chosen)):
        stray = [name for name in losses if name not in chosen] or [n for n in chosen if n not in losses]
        raise UsageError(
            f"the files chosen in conf/loss are {chosen} but they declare {list(losses)}: a file's single key must be "
            f"its stem, or it would silently replace another loss (see '{stray[0] if stray else ''}')"
        )
    if not losses:
        raise UsageError("no loss is chosen; give for example 'loss=[nll,ce,kl]'")
    for name, loss in losses.items():
        for key in ("fn", "args"):
            if not loss.get(key):
                raise UsageError(f"loss.{name}.{key} is missing; a loss declares fn (with _target_) and args")
        if set(loss) - {"fn", "args"}:
            raise UsageError(f"loss.{name} has unknown keys {sorted(set(loss) - {'fn', 'args'})}; it takes fn and args")
        check_call(f"loss.{name}.fn", loss["fn"], (), complete=not loss["fn"].get("_partial_", False))


def seeds_of(config: Mapping[str, Any]) -> list[int]:
    """The seeds as a list: distinct integers from 0 to 2**32 - 1."""
    seeds = config["seed"] if isinstance(config["seed"], list) else [config["seed"]]
    if not seeds:
        raise UsageError("seed is empty; give an integer or a list such as seed=[0,1,2]")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise UsageError(f"seed={seed!r} is not an integer from 0 to {MAX_SEED}; give one, or a list of them")
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if repeated:
        raise UsageError(f"seed repeats {repeated}; every seed is trained once")
    return seeds


def _check_numbers(config: Mapping[str, Any]) -> None:
    trainer = config["trainer"]
    least = {
        "epochs": (config["epochs"], 1), "batch_size": (config["batch_size"], 1),
        "warmup_steps": (config["warmup_steps"], 0), "max_seeds": (config["max_seeds"], 2),
        "trainer.threads": (trainer["threads"], 1), "trainer.inner_steps": (trainer["inner_steps"], 1),
        "trainer.tile": (1 if trainer["tile"] is None else trainer["tile"], 1),
    }  # fmt: skip
    for key, (value, smallest) in least.items():
        if value < smallest:
            raise UsageError(f"{key}={value}; it must be at least {smallest}")
    if not 0 < config["alpha"] < 0.5:
        raise UsageError(f"alpha={config['alpha']}; it must lie between 0 and 0.5")
    if config["clip_norm"] is not None and not 0 < config["clip_norm"] < math.inf:
        raise UsageError(f"clip_norm={config['clip_norm']}; give a positive number, or null for no clipping")


def reference_of(config: Mapping[str, Any]) -> str:
    """The loss that the others are compared with."""
    chosen, reference = list(config["loss"]), config["reference"]
    if reference is None:
        return "ce" if "ce" in chosen else chosen[0]
    if reference not in chosen:
        raise UsageError(f"reference={reference} is not among the chosen losses {chosen}; add it, or name one of them")
    return str(reference)


VERDICTS = (
    "same", "identical", "rounding", "offset", "scaled", "reweighted", "domain", "different", "equivalent",
    "inconclusive", "conflict", "not_run", "error",
)  # fmt: skip


def expectations_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What the user expects of each loss, by name; empty where nothing is asserted."""
    candidates = [name for name in config["loss"] if name != reference_of(config)]
    expect = config["expect"]
    if expect is None:
        return {}
    expected = dict.fromkeys(candidates, expect) if isinstance(expect, str) else expect
    if not isinstance(expected, Mapping):
        raise UsageError(f"expect={expect!r}; give a word such as same, or a mapping such as '{{nll: same}}'")
    for name, word in expected.items():
        if name not in candidates:
            raise UsageError(f"expect names '{name}', which is not a chosen candidate; those are {candidates}")
        if word not in VERDICTS:
            raise UsageError(f"expect.{name}={word!r} is not a verdict; the words are: {', '.join(VERDICTS)}")
    return {str(name): str(word) for name, word in expected.items()}


YARDSTICKS = ("nll", "accuracy", "brier", "ece")


def _check_margins(dataset: Mapping[str, Any]) -> None:
    margins, primary = dataset.get("margins") or {}, dataset.get("primary") or []
    for metric, margin in margins.items():
        if metric not in YARDSTICKS:
            raise UsageError(f"dataset.margins names '{metric}'; the yardsticks are {', '.join(YARDSTICKS)}")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < math.inf:
            raise UsageError(f"dataset.margins.{metric}={margin!r}; a margin is a positive number")
    for metric in primary:
        if metric not in YARDSTICKS or (margins and metric not in margins):
            raise UsageError(f"dataset.primary names '{metric}', which has no margin in dataset.margins")


def locate(key: str, target: Any) -> Any:
    """The object behind a dotted `_target_`."""
    if not isinstance(target, str) or "." not in target:
        raise UsageError(f"{key}._target_={target!r}; give a dotted path such as torch.nn.CrossEntropyLoss")
    module, _, attribute = target.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError as error:
        owner = _class_of(key, module, error)
    except Exception as error:
        raise UsageError(f"{key}._target_={target}: importing {module} failed: {first_line(error)}") from error
    if not callable(getattr(owner, attribute, None)):
        raise UsageError(f"{key}._target_={target}: {module} has no callable '{attribute}'; check the spelling")
    return getattr(owner, attribute)


def _class_of(key: str, path: str, error: ModuleNotFoundError) -> Any:
    """`module.Class` in `module.Class.method`; the original import error where there is no such class."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise UsageError(f"{key}._target_: cannot import {path}: {first_line(error)}") from error


def check_call(key: str, declared: Mapping[str, Any], given: Sequence[str], complete: bool = True) -> None:
    """Refuse keywords that the target does not take, values of another type than it says, and missing ones.

    The target's own signature is the schema, so a user's class is checked as closely as ours.
    """
    if "_target_" not in declared:
        raise UsageError(f"{key} declares no _target_; give a dotted path such as torch.nn.CrossEntropyLoss")
    target = locate(key, declared["_target_"])
    keywords = {k: v for k, v in declared.items() if k not in given and not str(k).startswith("_")}
    missing = [k for k, v in keywords.items() if v == "???"]
    if missing:
        raise UsageError(f"{key}.{missing[0]} is not set; give it on the command line: {key}.{missing[0]}=...")
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a built-in without a signature: its own call will tell
        return
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for word in keywords:
            if word not in parameters:
                takes = ", ".join(name for name in parameters if name not in given) or "nothing"
                raise UsageError(
                    f"unknown key '{key}.{word}'{_did_you_mean(word, list(parameters))}: "
                    f"{declared['_target_']} takes {takes}"
                )
    required = [
        name for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]  # fmt: skip
    if complete and not declared.get("_args_"):
        for name in required:
            if name not in keywords and name not in given:
                raise UsageError(f"{key}.{name} is missing: {declared['_target_']} needs it")
    _check_types(key, target, keywords)


def _check_types(key: str, target: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError, PydanticSchemaGenerationError

    owner = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(owner)
    except Exception:  # annotations that name what is not imported say nothing that could be checked
        return
    for word, value in keywords.items():
        if word not in hints or isinstance(value, Mapping):
            continue
        try:
            TypeAdapter(hints[word]).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise UsageError(f"{key}.{word}={value!r}: {said[0].lower() + said[1:]}") from error
        except (PydanticUserError, PydanticSchemaGenerationError):  # a type that pydantic does not know
            continue


register()
