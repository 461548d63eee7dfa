"""Build the dataset and the losses from their declarations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from likelihood_lab.errors import UsageError, first_line
from pipeline.config import schema as conf
from pipeline.data.dataset import Dataset
from pipeline.training.objectives import Formulation


def bind_target(declared: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the declared target with its keywords bound, not called."""
    try:
        made: Callable[..., Any] = instantiate({**declared, "_partial_": True}, _convert_="all")
    except HydraException as error:  # a `_target_` among the keywords
        raise UsageError(f"{declared['_target_']}: {_cause(error)}") from error
    return made


def _cause(error: BaseException) -> str:
    """Return the message of the error inside `instantiate`."""
    return first_line(error.__cause__ or error)


def load_dataset(declared: Mapping[str, Any]) -> Dataset:
    """Load the declared dataset. An error of the user's loader becomes a UsageError of one line."""
    target = declared["_target_"]
    load = bind_target({k: v for k, v in declared.items() if k not in conf.DATASET_PROTOCOL})
    try:
        data = load()
    except MemoryError as error:
        raise UsageError(f"dataset {target} does not fit into memory ({first_line(error)}); make it smaller") from error
    except Exception as error:
        if isinstance(error, UsageError) or target.startswith("pipeline."):
            raise
        raise UsageError(f"dataset {target} failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(data, Dataset):
        raise UsageError(f"dataset {target} returned {type(data).__name__}; return make_dataset(...)")
    return data


def formulation_of(name: str, loss: Mapping[str, Any]) -> Formulation:
    """Return the loss that the configuration declares."""

    def make() -> Any:
        try:
            return instantiate(loss["fn"], _convert_="all")
        except Exception as error:
            raise UsageError(f"loss.{name}.fn cannot be made: {_cause(error)}") from error

    return Formulation(name, tuple(loss["args"]), make, float(loss.get("lr_scale", 1)))
