"""State of an object between calls: a loss or a model that counts its own steps can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = set(vars(nn.Module()))  # registers and hooks: no state

ObjectState = list[dict[str, Any]]


def get_object_state(thing: Any) -> ObjectState:
    """Return the buffers and plain attributes of a callable, or of every part of a module."""
    return [dict(_state_of(part)) for part in _parts(thing)]


@torch.no_grad()
def set_object_state(thing: Any, state: ObjectState, device: torch.device) -> None:
    """Restore the state of an object that was built in the same way."""
    for part, values in zip(_parts(thing), state, strict=True):
        for name, value in values.items():
            old = getattr(part, name, None)
            if isinstance(value, Tensor) and isinstance(old, Tensor) and old.shape == value.shape:
                old.copy_(value)
            else:
                setattr(part, name, value.to(device) if isinstance(value, Tensor) else value)


def _parts(thing: Any) -> list[Any]:
    return list(thing.modules()) if isinstance(thing, nn.Module) else [thing] * hasattr(thing, "__dict__")


def _state_of(part: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(part, nn.Module):
        yield from part.named_buffers(recurse=False)
    for name, value in vars(part).items():
        if name not in _OF_TORCH and _is_plain(value):
            yield name, value.detach() if isinstance(value, Tensor) else value


def _is_plain(value: Any) -> bool:
    """Return True if the value can be read back from a file without executing code."""
    if type(value) is dict:
        return _is_plain([*value, *value.values()])
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, Tensor)
