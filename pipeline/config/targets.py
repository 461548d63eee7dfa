"""Checks of declared calls: a dotted `_target_` and its keywords against the signature."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from likelihood_lab.errors import UsageError, did_you_mean, first_line


class BrokenImportError(UsageError):
    """The module exists, but raises an error while it is imported."""


Parameters = Mapping[str, inspect.Parameter]

MOVED = {
    "pipeline.losses": "likelihood_lab.categorical.losses",
    "pipeline.datasets": "pipeline.data",
    "pipeline.loaders": "pipeline.data.loaders",
    "pipeline.pictures": "pipeline.data.image_folder",
    "pipeline.soft_labels": "pipeline.data.soft_labels",
}
"""Modules that configurations and datasets of earlier versions name, and where their content is now."""


def locate(key: str, target: Any) -> Any:
    """Return the callable behind a dotted path; `key` is the configuration key that names it."""
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UsageError(f"{key}._target_={target!r}; give a dotted path such as torch.nn.CrossEntropyLoss")
    path, _, attribute = target.rpartition(".")
    if path in MOVED:
        raise UsageError(f"{key}._target_={target}: that is now {MOVED[path]}.{attribute}; change the name")
    owner = _owner(key, path)
    found = getattr(owner, attribute, None)
    if not callable(found):
        hint = did_you_mean(attribute, dir(owner))
        raise UsageError(f"{key}._target_={target}: {path} has no callable '{attribute}'{hint}")
    return found


def _owner(key: str, path: str) -> ModuleType | type:
    """Return the module of that path, or the class inside a module."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        module, _, name = path.rpartition(".")
        if module and error.name == path:
            found = getattr(_owner(key, module), name, None)
            if inspect.isclass(found):
                return found
        if error.name in MOVED:
            line = f"{key}._target_: {path} imports {error.name}, which is now {MOVED[error.name]}; change the import"
            raise UsageError(line) from error
        line = f"{key}._target_: cannot import {path} ({first_line(error)}); check spelling and PYTHONPATH"
        raise UsageError(line) from error
    except Exception as error:  # the module of a user may raise anything
        said = f"{type(error).__name__}: {first_line(error)}"
        raise BrokenImportError(f"{key}._target_: importing {path} failed: {said}") from error


def check_call(key: str, declared: Any, given: Sequence[str] = (), complete: bool = True) -> None:
    """Refuse unknown keywords, values of a wrong type, and missing keywords.

    The signature of the target is the schema, so a class of the user is checked like the pipeline's own.

    Args:
        given: keywords that the caller adds, or does not pass on.
        complete: whether all required keywords must be present; false for a function that is called later.
    """
    if not isinstance(declared, Mapping) or "_target_" not in declared:
        raise UsageError(f"{key} declares no _target_; give a dotted path such as torch.nn.CrossEntropyLoss")
    target = locate(key, declared["_target_"])
    keywords = {k: v for k, v in declared.items() if k not in given and not str(k).startswith("_")}
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # a built-in without a signature: calling it will show the error
        return
    name = declared["_target_"]
    _check_known(key, name, keywords, {k: p for k, p in parameters.items() if k not in given})
    if complete and "_args_" not in declared:
        for word in (word for word in _required(parameters) if word not in keywords and word not in given):
            raise UsageError(f"{key}.{word} is missing: {name} needs it")
    _check_types(key, target, keywords)


def _check_known(key: str, name: str, keywords: Mapping[str, Any], parameters: Parameters) -> None:
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for word in (word for word in keywords if word not in parameters):
        takes = ", ".join(parameters) or "nothing"
        raise UsageError(f"unknown key '{key}.{word}'{did_you_mean(word, parameters)}; {name} takes: {takes}")


def _required(parameters: Parameters) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in parameters.items() if p.default is p.empty and p.kind in kinds]


def _check_types(key: str, target: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    owner = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(owner)
    except Exception:  # annotations that name something not imported: nothing to check
        return
    for word, value in keywords.items():
        if isinstance(value, float) and math.isnan(value):
            raise UsageError(f"{key}.{word}=nan is no number; give one")
        if word not in hints or (isinstance(value, Mapping) and "_target_" in value):
            continue
        if complaint := _complaint(hints[word], value):
            raise UsageError(f"{key}.{word}={value!r}: {complaint}")


def _complaint(hint: Any, value: Any) -> str | None:
    """Return why a value from a YAML file is not of the annotated type; None if it is, or if that is unknown."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        # Strict: "3" is not a number. JSON: a list may stand for a tuple.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        problems = error.errors()
        if any(problem["type"] == "enum" for problem in problems):  # many libraries take a member's name too
            return None
        said = problems[0]["msg"]
        return said[0].lower() + said[1:]
    except (PydanticUserError, TypeError):  # pydantic does not know the type, or JSON not the value
        return None
    return None
