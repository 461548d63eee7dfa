"""The schema of every configuration group, and the meaning of keys that have several forms."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from likelihood_lab.errors import UsageError

MAX_SEED = 2**32 - 1  # what numpy, torch and scikit-learn all accept
ROOT = Path(__file__).resolve().parents[2]  # the checkout; the tracking database lives here by default
CONF = ROOT / "conf"


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


class AuditPrecision(Enum):
    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"


class Vary(Enum):
    all = "all"
    weights = "weights"
    order = "order"
    bit = "bit"


class About(Enum):
    objective = "objective"
    outcome = "outcome"


class Controls(Enum):
    auto = "auto"
    all = "all"
    none = "none"


@dataclass
class TrainerConf:
    accelerator: Accelerator = Accelerator.auto
    engine: Engine = Engine.auto
    tile: int | None = None  # runs trained at once; null: a rule decides
    threads: int = 1
    fast: bool = True  # use fast paths that give the same bits; see docs/speed.md
    inner_steps: int = 11  # optimizer steps in one Lightning training_step
    checkpoint_every: float | None = 60.0  # seconds between checkpoints of a tile; null: no checkpoints
    progress: bool = True


@dataclass
class ProtocolConf:
    alpha: float = 0.05
    looks: int = 1
    max_seeds: int | None = None  # null: the given seeds alone
    controls: Controls = Controls.auto
    vary: Vary = Vary.all


@dataclass
class TrackingConf:
    enabled: bool = True
    uri: str | None = None
    experiment: str = "likelihood-lab"


@dataclass
class TrainConf:
    loss: dict[str, Any] = field(default_factory=dict)  # name: {fn: {_target_: ...}, args: [...]}
    model: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    trainer: TrainerConf = field(default_factory=TrainerConf)
    tracking: TrackingConf = field(default_factory=TrackingConf)
    seed: Any = 0  # an integer or a list of integers
    share: Any = None  # internal, set by the sweeper: the seeds that this job trains; an empty list: conclude only
    reference: str | None = None  # null: ce, or the first loss where ce is not chosen
    epochs: int = 30
    batch_size: int = 64
    precision: Precision = Precision.float32
    schedule: Schedule = Schedule.constant
    warmup_steps: int = 0
    clip_norm: float | None = None
    about: About = About.objective
    expect: Any = None  # same, or {loss: word}
    protocol: ProtocolConf = field(default_factory=ProtocolConf)
    audit: bool = True


@dataclass
class AuditConf:
    loss: dict[str, Any] = field(default_factory=dict)
    tracking: TrackingConf = field(default_factory=TrackingConf)
    reference: str | None = None
    expect: Any = None
    dtype: AuditPrecision | None = None  # null: float32 and float64
    device: str = "cpu"
    ignore_index: int | None = None
    soft_targets: bool = False
    tokens: bool = False
    num_classes: Any = None  # a list of integers
    time_limit: float = 300.0
    memory_limit: float = 8.0
    jobs: int = 2


# Keys that name a trial: all that decide its numbers. Losses and seeds are left out, since they may be added later.
IDENTITY = (
    "model", "dataset", "optimizer", "epochs", "batch_size", "precision", "schedule", "warmup_steps", "clip_norm",
)  # fmt: skip
VARY_ALL = "all"  # the value of protocol.vary that is left out of a trial's identity
# Keys that name an audit.
AUDIT_IDENTITY = ("loss", "reference", "dtype", "device", "ignore_index", "soft_targets", "tokens", "num_classes")
# Keys of conf/dataset/*.yaml that the loader does not receive.
DATASET_PROTOCOL = ("margins", "primary", "dose")


def register() -> None:
    """Register the schema and the resolvers with Hydra. Calling it again is safe."""
    ConfigStore.instance().store(name="schema", node=TrainConf)
    ConfigStore.instance().store(name="audit_schema", node=AuditConf)
    OmegaConf.register_new_resolver("trial_name", _trial_name, replace=True)
    OmegaConf.register_new_resolver("audit_name", _audit_name, replace=True)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration as plain Python values."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a plain configuration that names its trial. Margins are left out: they decide no number."""
    kept = {key: config[key] for key in IDENTITY}
    kept["dataset"] = {k: v for k, v in config["dataset"].items() if k not in DATASET_PROTOCOL}
    vary = config["protocol"]["vary"]
    return kept if vary == VARY_ALL else kept | {"vary": vary}


def digest(value: Any) -> str:
    """Return the SHA-256 of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def short_name(target: str) -> str:
    """Return the last part of a dotted path: `mlp` for `pipeline.models.mlp`."""
    return target.rpartition(".")[2]


def trial_name(config: Mapping[str, Any]) -> str:
    """Return a stable folder name made from the configuration, such as digits-mlp-1f2e3d4c."""
    words = [short_name(str(config[group].get("_target_", group))) for group in ("dataset", "model")]
    return "-".join([*words, digest(identity(config))[:8]])


def _trial_name(*, _root_: DictConfig) -> str:
    return trial_name(plain(OmegaConf.create({key: _root_[key] for key in (*IDENTITY, "protocol")})))


def _audit_name(*, _root_: DictConfig) -> str:
    asked = plain(OmegaConf.create({key: _root_[key] for key in AUDIT_IDENTITY}))
    return f"audit-{digest(asked)[:8]}"


# --- keys with several forms


def seeds_of(config: Mapping[str, Any]) -> list[int]:
    """Return the seeds as a list of distinct integers from 0 to 2**32 - 1."""
    seeds = config["seed"] if isinstance(config["seed"], list) else [config["seed"]]
    if not seeds:
        raise UsageError("seed is empty; give an integer or a list such as seed=[0,1,2]")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise UsageError(f"seed={seed!r} is not an integer from 0 to {MAX_SEED}; give one, or a list")
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if repeated:
        raise UsageError(f"seed repeats {', '.join(map(str, repeated))}; name every seed once")
    return seeds


def share_of(config: Mapping[str, Any]) -> list[int] | None:
    """Return the seeds that this job trains, if several jobs share the trial.

    An empty list means that the job only writes the verdict; None means that it trains all seeds.
    """
    share = config["share"]
    if share is None:
        return None
    seeds = seeds_of(config)
    if not isinstance(share, list) or any(type(s) is not int or s not in seeds for s in share):
        raise UsageError(f"share={share}; give a list of some of the seeds ({', '.join(map(str, seeds))}), or null")
    return share


def reference_of(config: Mapping[str, Any]) -> str:
    """Return the name of the loss that the others are compared with."""
    chosen, reference = list(config["loss"]), config["reference"]
    if reference is None:
        return "ce" if "ce" in chosen else str(chosen[0])
    if reference not in chosen:
        raise UsageError(f"reference={reference} is not among the chosen losses, {', '.join(chosen)}; add it to them")
    return str(reference)


VERDICTS = (
    "same", "identical", "rounding", "offset", "scaled", "reweighted", "domain", "different", "equivalent",
    "inconclusive", "conflict", "not_run", "error",
)  # fmt: skip


def expectations_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the expected word of each loss, by name; empty if nothing is expected."""
    reference, expect = reference_of(config), config["expect"]
    candidates = [name for name in config["loss"] if name != reference]
    if expect is None:
        return {}
    if not candidates:
        raise UsageError(f"expect={expect!r}, but {reference} is the only loss; add one to compare it with")
    expected = dict.fromkeys(candidates, expect) if isinstance(expect, str) else expect
    if not isinstance(expected, Mapping):
        raise UsageError(f"expect={expect!r}; give a word such as same, or a mapping such as '{{nll: same}}'")
    for name, word in expected.items():
        if name not in candidates:
            raise UsageError(f"expect names '{name}'; the chosen candidates are {', '.join(candidates)}")
        if word not in VERDICTS:
            raise UsageError(f"expect: {name} {word!r} is no verdict; the words are {', '.join(VERDICTS)}")
    return {str(name): str(word) for name, word in expected.items()}


register()
