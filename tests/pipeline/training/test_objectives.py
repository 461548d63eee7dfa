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
from pipeline.training.objectives import Formulation, Objectives, ProbeFinding, code_digest, probe
from tests.laboratory import CPU, shipped

Fn = Callable[..., Any]


def declared(make: Callable[[], Any], *args: str) -> Formulation:
    return Formulation("mine", args or ("logits", "labels"), make)


def probed(fn: Fn, *args: str) -> ProbeFinding:
    return probe(declared(lambda: fn, *args), 3, CPU, torch.float32)


@pytest.mark.parametrize("formulation", shipped(), ids=lambda f: f.name)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.usefixtures("untouched_randomness")
def test_every_shipped_loss_passes_the_probe_and_draws_no_random_numbers(formulation: Formulation) -> None:
    assert not probe(formulation, 3, CPU, torch.float32).draws_random_numbers
    assert not formulation.fused


def test_log_probs_and_probs_are_made_of_the_logits_and_only_where_asked_for() -> None:
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    made = derive(("probs", "labels", "log_probs"), logits)
    assert made.keys() == {"probs", "log_probs"}
    assert torch.equal(made["probs"], logits.softmax(-1))
    assert torch.equal(made["log_probs"], logits.log_softmax(-1))
    assert derive(("logits",), logits)["logits"] is logits


def test_the_callable_receives_its_arguments_in_its_own_order() -> None:
    swapped = declared(lambda: lambda labels, logits: F.cross_entropy(logits, labels), "labels", "logits")
    logits, labels = torch.randn(1, 4, 3), torch.tensor([[0, 1, 2, 0]])
    objectives = Objectives([swapped], [Replica(swapped.name, 0)], 3, CPU, torch.float32)
    (found,) = objectives(Outputs(logits), labels, None)
    assert found == F.cross_entropy(logits[0], labels[0])


@pytest.mark.parametrize("args", [("logit",), ("logits", "labels", "y")])
def test_an_unknown_input_is_refused_with_those_there_are(args: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(str([args[-1]]))}; choose from {', '.join(INPUTS)}"):
        Formulation("mine", args, lambda: None)


def test_a_formulation_without_inputs_is_refused() -> None:
    with pytest.raises(UsageError, match=r"loss\.mine\.args is empty"):
        Formulation("mine", (), lambda: None)


class Weighted(nn.Module):
    def __init__(self, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=requires_grad)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, self.weight * self.scale)


def test_a_loss_with_trainable_parameters_is_refused_and_one_with_frozen_ones_is_not() -> None:
    with pytest.raises(UsageError, match=r"loss\.mine\.fn has trainable parameters"):
        declared(lambda: Weighted(True)).instance(CPU, torch.float32)
    frozen = declared(lambda: Weighted(False)).instance(CPU, torch.float64)
    assert {tensor.dtype for tensor in frozen.state_dict().values()} == {torch.float64}  # type: ignore[attr-defined]


def test_every_replica_gets_an_instance_of_its_own() -> None:
    formulation = declared(lambda: Weighted(False))
    assert formulation.instance(CPU, torch.float32) is not formulation.instance(CPU, torch.float32)


def test_a_declaration_that_makes_a_value_and_not_a_callable_is_refused_with_the_cure() -> None:
    with pytest.raises(UsageError, match=r"makes a Tensor, which cannot be called; .*_partial_: true"):
        declared(lambda: torch.zeros(())).instance(CPU, torch.float32)


def fails_backward(logits: Tensor, labels: Tensor) -> Tensor:
    """NumPy-minded: the probabilities are overwritten after the logarithm has been taken of them."""
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
        (
            lambda z, y: F.cross_entropy(z, y[:2]),
            r"failed when called with logits \[4, 3\], labels \[4\]: Expected",
        ),
        (lambda z: z.sum(), r"failed when called with logits \[4, 3\], labels \[4\]"),
        (lambda z, y: F.cross_entropy(z.sub_(z.amax(1, True)), y), "is being modified inplace"),
        (fails_backward, "modified by an inplace operation"),
    ],
    ids=["vector", "float", "detached", "numpy", "raises", "arity", "in place", "backward fails"],
)
@pytest.mark.usefixtures("untouched_randomness")
def test_a_loss_that_cannot_train_is_refused_before_training(fn: Fn, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as refused:
        probed(fn)
    assert "\n" not in str(refused.value)


def test_a_loss_that_gives_nan_passes_the_probe_for_it_is_a_diverged_arm_and_no_error() -> None:
    probed(lambda z, y: (z * torch.nan).sum())


@pytest.mark.usefixtures("untouched_randomness")
def test_the_probe_sees_that_a_loss_draws_random_numbers() -> None:
    assert probed(lambda z, y: F.cross_entropy(z + torch.randn_like(z), y)).draws_random_numbers
    assert not probed(nn.CrossEntropyLoss()).draws_random_numbers


def test_a_fused_loss_is_known_by_its_inputs_and_probed_with_them() -> None:
    def fn(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), labels)

    args = ("hidden", "weight", "bias", "labels")
    assert declared(lambda: fn, *args).fused
    assert not probed(fn, *args).draws_random_numbers


# --- what code stands behind a callable


def test_installed_code_is_named_by_its_version() -> None:
    expected = f"torch=={torch.__version__}"
    assert code_digest(nn.CrossEntropyLoss) == expected
    assert code_digest(partial(F.cross_entropy, label_smoothing=0.1)) == expected


def test_code_of_the_users_own_is_named_by_the_bytes_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "users_losses.py"
    source.write_text("def mine(logits, labels):\n    return logits.sum()\n")
    import users_losses  # type: ignore[import-not-found]

    before = code_digest(users_losses.mine)
    source.write_text("def mine(logits, labels):\n    return logits.mean()\n")
    assert before.startswith("sha256:")
    assert code_digest(partial(users_losses.mine, labels=None)) != before


def test_losses_of_one_file_share_its_digest() -> None:
    assert code_digest(losses.brier_score) == code_digest(partial(losses.reverse_kl_divergence, floor=0.1))
