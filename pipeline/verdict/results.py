"""Content of verdict.json as dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from likelihood_lab.audit.finding import strict
from likelihood_lab.stats.equivalence import MetricFinding
from likelihood_lab.stats.trajectory import Envelope

SCHEMA = 1
Readers = Mapping[str, Callable[[Any], Any]]  # field -> function that reads its JSON


@dataclass(frozen=True)
class JsonContent:
    """Base of the dataclasses that are read from JSON; a field that is null or missing has its default."""

    nested: ClassVar[Readers] = {}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read JSON of this or an older version; keys that are not fields are ignored."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__} is an object in JSON, got {type(values).__name__}")
        known = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
        return cls(**known | {name: read(known[name]) for name, read in cls.nested.items() if name in known})

    def to_json(self) -> dict[str, Any]:
        """Return strict JSON: null for what is not finite."""
        content: dict[str, Any] = strict(asdict(self))
        return content


@dataclass(frozen=True)
class MetricResult(JsonContent):
    """Paired difference of one metric; candidate minus reference."""

    mean_difference: float | None = None
    ci_tost: Sequence[float] | None = None
    ci_difference: Sequence[float] | None = None
    level: float | None = None
    margin: float | None = None
    p_tost: float | None = None
    n: int | None = None
    pair_correlation: float | None = None

    @classmethod
    def of(cls, finding: MetricFinding) -> Self:
        return cls(**{f.name: getattr(finding, f.name) for f in fields(cls)})

    @property
    def smallest_margin(self) -> float | None:
        """The smallest margin that the equivalence test passes: its interval must lie inside. None without one."""
        return max((abs(end) for end in self.ci_tost or () if end is not None), default=None)


@dataclass(frozen=True)
class Failure(JsonContent):
    """A run that diverged, is missing or is damaged."""

    seed: int
    step: int | None = None
    cause: str = ""


UNKNOWN = Envelope("not_applicable")


def _failures(entries: Sequence[Mapping[str, Any]]) -> list[Failure]:
    return [Failure.from_json(entry) for entry in entries]


def _metrics(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, MetricResult]:
    return {name: MetricResult.from_json(entry or {}) for name, entry in entries.items()}


@dataclass(frozen=True)
class Comparison(JsonContent):
    """Result for one candidate: an entry of `comparisons`."""

    loss: str
    objective: str = "not_run"
    scale: Mapping[str, Any] | None = None
    offset: Mapping[str, Any] | None = None
    domain: Mapping[str, Any] | None = None
    side_effects: Sequence[str] | None = None
    outcome: str = "not_run"
    envelope: Envelope = UNKNOWN
    seeds_needed: int | str | None = None
    verdict: str = "not_run"
    sentence: str = ""
    expected: str | None = None
    confirmed: bool | None = None
    assay_sensitivity: Mapping[str, bool | None] | None = None
    would_have_caught: str | None = None
    covered: Sequence[str] | None = None
    not_covered: Sequence[str] | None = None
    failures: Sequence[Failure] = ()
    metrics: Mapping[str, MetricResult] = field(default_factory=dict)

    nested: ClassVar[Readers] = {
        "envelope": lambda values: Envelope(**{"word": "not_applicable", **values}),
        "failures": _failures,
        "metrics": _metrics,
    }


@dataclass(frozen=True)
class Protocol(JsonContent):
    """Rules that were fixed before the data, and the look at which this verdict was made."""

    hash: str = ""
    alpha: float | None = None
    looks: int = 1
    look: int = 1
    level: float | None = None
    margins: Mapping[str, float] | None = None
    primary: Sequence[str] = ()


@dataclass(frozen=True)
class Replay(JsonContent):
    """Comparison of the reference with its replay, bit by bit."""

    seed: int
    bitwise: bool


@dataclass(frozen=True)
class ControlResults(JsonContent):
    """Results of the controls: their outcomes and metrics by name."""

    replay: Replay | None = None
    outcomes: Mapping[str, str] = field(default_factory=dict)
    assay_sensitivity: Mapping[str, bool | None] | None = None
    metrics: Mapping[str, Mapping[str, MetricResult]] = field(default_factory=dict)

    nested: ClassVar[Readers] = {
        "replay": Replay.from_json,
        "metrics": lambda values: {name: _metrics(entries) for name, entries in values.items()},
    }

    @property
    def placebos(self) -> dict[str, str]:
        """Outcome of each placebo."""
        return {name: word for name, word in self.outcomes.items() if name.startswith("placebo")}

    @property
    def placebos_are_equal(self) -> bool:
        """At least one placebo was tested, and none was found other than equal to the reference."""
        words = set(self.placebos.values())
        return bool(words) and words <= {"equivalent", "identical"}


@dataclass(frozen=True)
class Verdict(JsonContent):
    """Content of verdict.json."""

    schema: int = SCHEMA
    sweep: str = ""
    dataset: str = ""
    model: str = ""
    optimizer: Mapping[str, Any] | None = None
    precision: str = ""
    vary: str = "all"
    environment: Mapping[str, Any] = field(default_factory=dict)
    about: str = "objective"
    reference: str = ""
    seeds: Sequence[int] = ()
    protocol: Protocol = Protocol()
    controls: ControlResults = field(default_factory=ControlResults)
    reference_failures: Sequence[Failure] = ()
    comparisons: Sequence[Comparison] = ()

    nested: ClassVar[Readers] = {
        "protocol": Protocol.from_json,
        "controls": ControlResults.from_json,
        "reference_failures": _failures,
        "comparisons": lambda entries: [Comparison.from_json(entry) for entry in entries],
    }
