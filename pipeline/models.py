"""Shipped networks, and the builder that makes a model from any declared callable.

A model is a callable that returns an `nn.Module` whose output is logits. It receives `input_shape` (channels, height,
width) and `num_classes` if it has arguments of these names, so torchvision's builders work unchanged.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from likelihood_lab.errors import UsageError, first_line

Shape = tuple[int, int, int]


def softmax_regression(input_shape: Shape, num_classes: int) -> nn.Module:
    """Build one linear layer: multinomial logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))


def mlp(
    input_shape: Shape,
    num_classes: int,
    hidden: Sequence[int] = (128,),
    dropout: float = 0.0,
    batch_norm: bool = False,
) -> nn.Module:
    """Build linear layers with ReLU between them, optionally with BatchNorm before and dropout after each ReLU."""
    if min(hidden, default=1) < 1:
        raise UsageError(f"model.hidden={list(hidden)}; a layer has 1 feature or more")
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(input_shape)
    for features in hidden:
        layers.append(nn.Linear(width, features))
        if batch_norm:
            layers.append(nn.BatchNorm1d(features))
        layers.append(nn.ReLU())
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = features
    layers.append(nn.Linear(width, num_classes))
    return nn.Sequential(*layers)


def cnn(
    input_shape: Shape,
    num_classes: int,
    channels: Sequence[int] = (32, 64),
    hidden: int = 128,
    dropout: float = 0.0,
) -> nn.Module:
    """Build blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 max-pooling, then one hidden layer."""
    depth, height, width = input_shape
    layers: list[nn.Module] = []
    for out_channels in channels:
        layers += [nn.Conv2d(depth, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        depth, height, width = out_channels, height // 2, width // 2
    if not height or not width:
        raise UsageError(
            f"{len(channels)} poolings reduce a {input_shape[1]} x {input_shape[2]} picture to size 0: "
            "give model.channels fewer entries"
        )
    layers += [nn.Flatten(), nn.Linear(depth * height * width, hidden), nn.ReLU()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(hidden, num_classes))
    return nn.Sequential(*layers)


class ModelBuilder:
    """Builds plain modules of one architecture, one for each seed, for one input shape and class count.

    Args:
        make: the declared callable with its configured keywords bound.
        name: the name of the model in messages.
    """

    def __init__(self, make: Callable[..., Any], name: str, input_shape: Shape, num_classes: int) -> None:
        self.make, self.name, self.num_classes = make, name, num_classes
        self.input_shape = self._choose_shape(input_shape)

    def __call__(self, seed: int) -> nn.Module:
        """Return a newly initialised module in float32. The global random state does not change."""
        return self._build(seed, self.input_shape)

    def _build(self, seed: int, shape: Shape) -> nn.Module:
        given = {"input_shape": shape, "num_classes": self.num_classes}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = self.make(**{key: given[key] for key in _accepted(self.make, given)})
        if not isinstance(module, nn.Module):
            raise UsageError(f"model {self.name} returned {type(module).__name__}, not a torch.nn.Module")
        if not any(p.requires_grad for p in module.parameters()):
            raise UsageError(f"model {self.name} has no trainable parameters")
        return module

    def _choose_shape(self, shape: Shape) -> Shape:
        """Return the shape of the data, with three channels if the data are grey and the model takes only colour."""
        errors: list[Exception] = []
        for candidate in (shape, (3, *shape[1:])) if shape[0] == 1 else (shape,):
            try:
                self._probe(candidate)
            except UsageError:
                raise
            except Exception as error:
                errors.append(error)
            else:
                return candidate
        message = f"model {self.name} does not take inputs of shape {list(shape)}: {first_line(errors[0])}"
        raise UsageError(message) from errors[0]

    def _probe(self, shape: Shape) -> None:
        module = self._build(0, shape).eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = module(torch.zeros(2, *shape))
        if not isinstance(logits, Tensor) or logits.shape != (2, self.num_classes):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(
                f"model {self.name} maps a batch of 2 to {got}; logits of shape [2, {self.num_classes}] are needed "
                f"for {self.num_classes} classes"
            )


def _accepted(make: Callable[..., Any], offered: dict[str, Any]) -> list[str]:
    """Return the offered keywords that `make` takes: by name, or `num_classes` through `**kwargs`."""
    parameters = inspect.signature(make).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [key for key in offered if key in parameters or (open_ended and key == "num_classes")]
