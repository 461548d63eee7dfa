"""Checks of a composed configuration beyond those of Hydra."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from likelihood_lab.errors import UsageError, did_you_mean
from pipeline.config import schema as conf
from pipeline.config.hydra_glue import INTERNAL_KEYS, in_one_line, moved_key
from pipeline.config.targets import check_call, locate
from pipeline.replica import is_control
from pipeline.text import without_password

Plain = Mapping[str, Any]

# Smallest and largest value of each number. The largest is far beyond any use, but does not exhaust a machine.
LIMITS = {
    "epochs": (1, 10**9), "batch_size": (1, 10**9), "warmup_steps": (0, 10**9),
    "protocol.max_seeds": (2, 10**6), "protocol.looks": (1, 1000), "trainer.threads": (1, 1024),
    "trainer.inner_steps": (1, 10**6), "trainer.tile": (1, 4096), "trainer.checkpoint_every": (0, 10**9),
}  # fmt: skip

MOST_CLASSES = 2**18  # classes in an audit: as many as the largest vocabularies; 300 such rows take 0.6 GB

# Keywords that the pipeline adds when it calls the target of a group, or does not pass on.
GIVEN_BY_PIPELINE = {
    "model": ("input_shape", "num_classes"),
    "dataset": conf.DATASET_PROTOCOL,
    "optimizer": ("params",),
}


def validate(cfg: DictConfig) -> None:
    """Refuse a configuration that cannot be trained, in one line, before anything is written.

    Raises:
        UsageError: always with the key, the value and what to give instead.
    """
    config = _plain(cfg)
    _check_keys(config)
    _check_numbers(config)
    conf.seeds_of(config)
    conf.share_of(config)
    _check_files(chosen_files("loss"))
    if not config["loss"]:
        raise UsageError("no loss is chosen; give for example 'loss=[nll,ce,kl]'")
    conf.expectations_of(config)
    _check_margins(config["dataset"])
    dose = config["dataset"].get("dose")
    if dose is not None and (isinstance(dose, bool) or not isinstance(dose, int | float) or not -1 < dose < 1000):
        raise UsageError(f"dataset.dose={dose!r}; give a number from -1 to 1000: the logits are multiplied by 1 + dose")
    for name, loss in config["loss"].items():
        if is_control(name):
            raise UsageError(f"loss.{name} has the name of a control that trials add by themselves; rename it")
        validate_loss(f"loss.{name}", loss)
    for group, given in GIVEN_BY_PIPELINE.items():
        check_call(group, config[group], given)


def validate_audit(cfg: DictConfig) -> None:
    """Refuse the configuration of an audit that cannot run.

    Only the form of the losses is checked. Each loss is imported later in its own subprocess.

    Raises:
        UsageError: always with the key, the value and what to give instead.
    """
    config = _plain(cfg)
    _check_fields("", config, conf.AuditConf.__dataclass_fields__)
    _check_tracking(config["tracking"])
    for key, smallest in {"time_limit": 1.0, "memory_limit": 0.5, "jobs": 1}.items():
        if not config[key] >= smallest:
            raise UsageError(f"{key}={config[key]}; it must be at least {smallest:g}")
    classes = config["num_classes"]
    if classes is not None and not (
        isinstance(classes, list) and all(type(c) is int and 2 <= c <= MOST_CLASSES for c in classes) and classes
    ):
        line = f"num_classes={classes}; give a list of integers from 2 on, such as '[2,10]', up to {MOST_CLASSES}"
        raise UsageError(line)
    if (ignored := config["ignore_index"]) is not None and not -(2**63) <= ignored < 2**63:
        raise UsageError(f"ignore_index={ignored}; give a number that a label can be, such as -100")
    _check_files(chosen_files("loss"))
    if not config["loss"]:
        raise UsageError("no loss is chosen; give for example 'loss=[ce,nll,kl]'")
    if len(config["loss"]) < 2:
        only = next(iter(config["loss"]))
        raise UsageError(f"{only} is the only loss; add one to compare it with, such as 'loss=[{only},nll]'")
    conf.expectations_of(config)
    for name, loss in config["loss"].items():
        _check_form(f"loss.{name}", loss)
    validate_loss(f"loss.{conf.reference_of(config)}", config["loss"][conf.reference_of(config)])


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without Hydra's own part; refuse missing values."""
    own = cfg.copy()
    with open_dict(own):
        own.pop("hydra", None)
    try:
        for key in sorted(OmegaConf.missing_keys(own)):
            raise UsageError(f"{key} is not set; give it on the command line: {key}=...")
        return conf.plain(own)
    except OmegaConfBaseException as error:
        raise UsageError(in_one_line(error)) from error


def _check_keys(config: Plain) -> None:
    """Refuse keys added by `+key=value` and keys removed by `~key`, which Hydra allows."""
    _check_fields("", config, conf.TrainConf.__dataclass_fields__)
    _check_fields("trainer.", config["trainer"], conf.TrainerConf.__dataclass_fields__)
    _check_fields("protocol.", config["protocol"], conf.ProtocolConf.__dataclass_fields__)
    _check_tracking(config["tracking"])


def _check_fields(prefix: str, given: Plain, known: Iterable[str]) -> None:
    known = list(known)
    offered = [key for key in known if key not in INTERNAL_KEYS]
    for key in (key for key in given if key not in known):
        if line := moved_key(f"{prefix}{key}"):
            raise UsageError(line)
        keys = f"{prefix.rstrip('.')} takes" if prefix else "the keys are"
        raise UsageError(f"unknown key '{prefix}{key}'{did_you_mean(key, offered)}; {keys}: {', '.join(offered)}")
    for key in (key for key in known if key not in given):
        raise UsageError(f"{prefix}{key} is missing; leave it as it is by default, or give it a value")


def _check_tracking(tracking: Plain) -> None:
    """Refuse a password in the configuration, which is shown, stored and given to launchers."""
    _check_fields("tracking.", tracking, conf.TrackingConf.__dataclass_fields__)
    uri = tracking["uri"] or ""
    if (safe := without_password(uri)) != uri:
        raise UsageError(
            f"tracking.uri={safe} came with a password; give it by MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (PGPASSWORD for PostgreSQL), which no configuration shows"
        )


def _check_numbers(config: Plain) -> None:
    groups = {f"{group}.{key}": value for group in ("trainer", "protocol") for key, value in config[group].items()}
    values = {**config, **groups}
    for key, (least, most) in LIMITS.items():
        if values[key] is not None and not least <= values[key] <= most:
            raise UsageError(f"{key}={values[key]}; it must be at least {least} and at most {most}")
    alpha, looks, max_seeds = (config["protocol"][key] for key in ("alpha", "looks", "max_seeds"))
    if max_seeds is not None and looks < 2:
        raise UsageError(
            f"protocol.max_seeds={max_seeds} adds seeds at further looks; declare the looks, such as protocol.looks=2"
        )
    if not 0 < alpha < 0.5:
        raise UsageError(f"protocol.alpha={alpha}; it must lie between 0 and 0.5")
    if config["clip_norm"] is not None and not 0 < config["clip_norm"] < math.inf:
        raise UsageError(f"clip_norm={config['clip_norm']}; give a positive number, or null for no clipping")


# --- losses


def chosen_files(group: str) -> dict[str, list[Path]]:
    """Return the chosen options of a group with their files; empty outside a Hydra job.

    If several files have one name, Hydra reads the first.
    """
    if not (HydraConfig.initialized() and GlobalHydra.instance().is_initialized()):
        return {}
    settings, loader = HydraConfig.get(), GlobalHydra.instance().config_loader()
    overrides = [*settings.overrides.hydra, *settings.overrides.task]
    found = loader.compute_defaults_list(settings.job.config_name, overrides, RunMode.RUN)
    paths = [Path(str(default.config_path)) for default in found.defaults]
    folders = [Path(source.path) for source in settings.runtime.config_sources if source.schema == "file"]
    stems = [path.name for path in paths if str(path.parent) == group]
    for stem in (stem for stem in stems if stems.count(stem) > 1):
        raise UsageError(f"{group}={stem} is chosen more than once; name every {group} once")
    files = {stem: [folder / group / f"{stem}.yaml" for folder in folders] for stem in stems}
    return {stem: [file for file in candidates if file.is_file()] for stem, candidates in files.items()}


def _check_files(chosen: Mapping[str, list[Path]]) -> None:
    """Refuse a loss with another name than its file, which would silently replace the loss of that name."""
    for stem, files in chosen.items():
        for file in files[1:]:
            raise UsageError(f"{file} is hidden by {files[0]}; give it, and the key in it, another name")
        for file in files:
            keys = [str(key) for key in OmegaConf.load(file) if key != "defaults"]
            if keys != [stem]:
                raise UsageError(f"{file} declares {', '.join(keys)}; give it the single key {stem}, its own name")


def validate_loss(key: str, loss: Any) -> None:
    """Refuse a loss that cannot be called. Imports its module and compares its keywords with its signature.

    Raises:
        UsageError: always with the key, the value and what to give instead.
    """
    _check_form(key, loss)
    fn = loss["fn"]
    if isinstance(fn, Mapping) and "_target_" in fn:
        _check_partial(f"{key}.fn", locate(f"{key}.fn", fn["_target_"]), fn)
    check_call(f"{key}.fn", fn, complete=not (isinstance(fn, Mapping) and fn.get("_partial_")))


def _check_form(key: str, loss: Any) -> None:
    if not isinstance(loss, Mapping):
        raise UsageError(f"{key} is not a mapping; a loss declares fn (with _target_) and args")
    for part in ("fn", "args"):
        if not loss.get(part):
            raise UsageError(f"{key}.{part} is missing; a loss declares fn (with _target_) and args")
    _check_fields(f"{key}.", {"lr_scale": 1, **loss}, ("fn", "args", "lr_scale"))
    _check_args(f"{key}.args", loss["args"])
    scale = loss.get("lr_scale", 1)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UsageError(f"{key}.lr_scale={scale!r}; give a positive factor of the learning rate, such as 10")


def _check_partial(key: str, target: Any, fn: Plain) -> None:
    """Refuse a class with `_partial_` (calling it makes the loss) and a function without (it is the loss)."""
    if inspect.isclass(target) and fn.get("_partial_"):
        raise UsageError(f"{key}: {fn['_target_']} is a class, which makes the loss; remove `_partial_`")
    if inspect.isroutine(target) and not fn.get("_partial_"):
        try:
            inspect.signature(target).bind(**{k: v for k, v in fn.items() if not k.startswith("_")})
        except (TypeError, ValueError) as error:
            line = f"{key}: {fn['_target_']} is a function; add `_partial_: true` ({error})"
            raise UsageError(line) from error


def _check_args(key: str, args: Any) -> None:
    from likelihood_lab.categorical.inputs import INPUTS

    for arg in args if isinstance(args, Sequence) and not isinstance(args, str) else [args]:
        if arg not in INPUTS:
            hint = did_you_mean(str(arg), INPUTS)
            raise UsageError(f"{key} names {arg!r}{hint}; it is a list of {', '.join(INPUTS)}")
    if isinstance(args, str):
        raise UsageError(f"{key}={args}; give a list: [{args}]")
    if {"hidden", "weight", "bias"} & set(args) and not {"hidden", "weight"} <= set(args):
        raise UsageError(f"{key}={list(args)}: a fused loss takes both hidden and weight")


# --- margins


def _check_margins(dataset: Plain) -> None:
    from likelihood_lab.stats.pairs import METRICS

    margins, primary = dataset.get("margins"), dataset.get("primary")
    margins, primary = {} if margins is None else margins, [] if primary is None else primary
    if not isinstance(margins, Mapping):
        raise UsageError(f"dataset.margins={margins!r}; give a mapping such as '{{nll: 0.05}}'")
    if not isinstance(primary, list):
        raise UsageError(f"dataset.primary={primary!r}; give a list such as [nll,accuracy]")
    for metric, margin in margins.items():
        if metric not in METRICS:
            raise UsageError(f"dataset.margins names '{metric}'; the metrics are {', '.join(METRICS)}")
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < math.inf:
            raise UsageError(f"dataset.margins.{metric}={margin!r}; a margin is a positive number")
    for metric in primary:
        if metric not in [*METRICS]:
            raise UsageError(f"dataset.primary names '{metric}'; the metrics are {', '.join(METRICS)}")
        if margins and metric not in margins:
            raise UsageError(f"dataset.primary names '{metric}', which has no margin in dataset.margins")
