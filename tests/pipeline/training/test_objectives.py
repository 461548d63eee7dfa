"""Losses from their declarations: inputs, refusals, the probe, and the digest of their code."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likelihood_lab.categorical import losses
from likelihood_lab.categorical.inputs import INPUTS, derive
from likelihood_lab.errors import UsageError
from pipeline.engine.stack import Outputs
from pipeline.replica import Replica
from pipeline.training.objectives import Formulation, Objectives, code_digest, probe
from tests.laboratory import CPU, shipped

Fn = Callable[..., Any]


def declared(make: Callable[[], Any], *args: str) -> Formulation:
    return Formulation("mine", args or ("logits", "labels"), make)


def probed(fn: Fn, *args: str) -> bool:
    return probe(declared(lambda: fn, *args), 3, CPU, torch.float32)


@pytest.mark.parametrize("formulation", shipped(), ids=lambda f: f.name)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.usefixtures("untouched_randomness")
def test_shipped_losses_pass_the_probe_without_draws(formulation: Formulation) -> None:
    assert not probe(formulation, 3, CPU, torch.float32)
    assert not formulation.fused


def test_derive_makes_only_the_requested_inputs() -> None:
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    made = derive(("probs", "labels", "log_probs"), logits)
    assert made.keys() == {"probs", "log_probs"}
    assert torch.equal(made["probs"], logits.softmax(-1))
    assert torch.equal(made["log_probs"], logits.log_softmax(-1))
    assert derive(("logits",), logits)["logits"] is logits


def test_arguments_are_in_the_declared_order() -> None:
    swapped = declared(lambda: lambda labels, logits: F.cross_entropy(logits, labels), "labels", "logits")
    logits, labels = torch.randn(1, 4, 3), torch.tensor([[0, 1, 2, 0]])
    objectives = Objectives([swapped], [Replica(swapped.name, 0)], 3, CPU, torch.float32)
    (found,) = objectives(Outputs(logits), labels, None)
    assert found == F.cross_entropy(logits[0], labels[0])


@pytest.mark.parametrize(
    ("args", "problem"),
    [(("logit",), "names unknown inputs ['logit']"), (("logits", "labels", "y"), "['y']"), ((), "is empty")],
)
def test_unknown_or_missing_inputs_are_refused(args: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UsageError, match=f"loss.mine.args .*{re.escape(problem)}; choose from {', '.join(INPUTS)}"):
        Formulation("mine", args, lambda: None)


class Weighted(nn.Module):
    def __init__(self, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=requires_grad)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, self.weight * self.scale)


def test_only_trainable_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match=r"loss\.mine\.fn has trainable parameters"):
        declared(lambda: Weighted(True)).instance(CPU, torch.float32)
    frozen = declared(lambda: Weighted(False)).instance(CPU, torch.float64)
    assert {tensor.dtype for tensor in frozen.state_dict().values()} == {torch.float64}


def test_every_replica_gets_a_new_instance() -> None:
    replicas = [Replica("mine", seed) for seed in (0, 3)]
    (arm,) = Objectives([declared(lambda: Weighted(False))], replicas, 3, CPU, torch.float32).arms
    assert arm.fns[0] is not arm.fns[1]


def test_value_instead_of_a_callable_is_refused() -> None:
    with pytest.raises(UsageError, match=r"makes a Tensor, which cannot be called; .*_partial_: true"):
        declared(lambda: torch.zeros(())).instance(CPU, torch.float32)


def fails_backward(logits: Tensor, labels: Tensor) -> Tensor:
    """It overwrites the probabilities after their logarithm."""
    probs = logits.softmax(1)
    logs = probs.log()
    probs.clamp_(min=0.5)
    return F.nll_loss(logs, labels)


@pytest.mark.parametrize(
    ("fn", "complaint"),
    [
        (nn.CrossEntropyLoss(reduction="none"), r"returned a tensor of shape \[4\] .*reduction='mean'"),
        (lambda z, y: F.cross_entropy(z, y).item(), "returned float for a batch"),
        (lambda z, y: F.cross_entropy(z.detach(), y), "passes no gradient"),
        (lambda z, y: torch.tensor(np.float32(z.detach().sum())), "passes no gradient"),
        (lambda z, y: F.cross_entropy(z, y[:2]), r"failed when called with logits \[4, 3\], labels \[4\]: Expected"),
        (lambda z: z.sum(), r"failed when called with logits \[4, 3\], labels \[4\]"),
        (lambda z, y: F.cross_entropy(z.sub_(z.amax(1, True)), y), "is being modified inplace"),
        (fails_backward, "modified by an inplace operation"),
    ],
    ids=["vector", "float", "detached", "numpy", "raises", "arity", "in place", "backward fails"],
)
@pytest.mark.usefixtures("untouched_randomness")
def test_probe_refuses_a_loss_that_cannot_train(fn: Fn, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as refused:
        probed(fn)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("untouched_randomness")
def test_probe_detects_random_draws() -> None:
    assert probed(lambda z, y: F.cross_entropy(z + torch.randn_like(z), y))
    assert not probed(nn.CrossEntropyLoss())
    assert not probed(lambda z, y: (z * torch.nan).sum())  # NaN is a divergence and no error


def test_fused_loss_is_probed_with_its_inputs() -> None:
    def fn(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), labels)

    args = ("hidden", "weight", "bias", "labels")
    assert declared(lambda: fn, *args).fused
    assert not probed(fn, *args)


# --- digest of the code


def test_digest_of_installed_code_is_its_version() -> None:
    expected = f"torch=={torch.__version__}"
    assert code_digest(nn.CrossEntropyLoss) == expected
    assert code_digest(partial(F.cross_entropy, label_smoothing=0.1)) == expected


def test_digest_of_other_code_is_that_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "users_losses.py"
    source.write_text("def mine(logits, labels):\n    return logits.sum()\n")
    import users_losses

    before = code_digest(users_losses.mine)
    source.write_text("def mine(logits, labels):\n    return logits.mean()\n")
    assert before.startswith("sha256:")
    assert code_digest(partial(users_losses.mine, labels=None)) != before
    assert code_digest(losses.brier_score) == code_digest(partial(losses.reverse_kl_divergence, floor=0.1))
