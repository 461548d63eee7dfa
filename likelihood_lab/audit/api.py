"""Audit a loss from Python: is it the same function as a reference? It needs neither Hydra, Lightning nor MLflow."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from likelihood_lab.audit.capture import capture
from likelihood_lab.audit.context import AuditContext, audit_of, device_of, with_ignored
from likelihood_lab.audit.evaluate import Loss
from likelihood_lab.audit.examine import examine
from likelihood_lab.audit.finding import Finding
from likelihood_lab.categorical.batches import AuditBatch
from likelihood_lab.categorical.inputs import INPUTS, LossFn
from likelihood_lab.errors import UsageError, did_you_mean, first_line

__all__ = ["Finding", "assert_same_loss", "capture", "check"]

LOGITS_AND_LABELS = ("logits", "labels")
LITERAL = 40  # batches of at most so many logits are printed as code
_audits: dict[tuple[Any, ...], AuditContext] = {}
_with_ignore: dict[tuple[LossFn, int | None], LossFn] = {}


def check(
    fn: LossFn,
    reference: LossFn = F.cross_entropy,
    *,
    args: Sequence[str] = LOGITS_AND_LABELS,
    reference_args: Sequence[str] = LOGITS_AND_LABELS,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore_index: int | None = None,
    soft_targets: bool = False,
    tokens: bool = False,
    num_classes: Sequence[int] | None = None,
    batches: Sequence[AuditBatch] = (),
) -> Finding:
    r"""Test whether `fn` is the same function as `reference`, by gradients and values. Nothing is trained.

    Both are called on a grid of batches. A row's error is measured in units of the error that rounding must cause,

        max(the reference's own error, u (1 + max_j max(|z_j|, |log p_j|) + sqrt(C)) s),

    where u is the unit roundoff, z [N, C] are the logits, p their softmax and s is the row's weight (1/N for a mean).
    At most 12 units are allowed.

    Parameters
    ----------
    fn : callable
        Returns the scalar objective, or a tuple that begins with it.
    reference : callable
        Usually the mean cross-entropy in nats, in [0, inf).
    args, reference_args : sequence of str
        Inputs of each callable, in its own order: logits [N, C], log_probs [N, C], probs [N, C], labels int64 [N],
        target_probs [N, C]; hidden [N, D], weight [C, D] and bias [C] for fused losses. A reference that takes logits
        is compared with a fused loss through a linear layer.
    dtype : torch.dtype, optional
        Only this precision, such as torch.bfloat16; by default float32 and float64.
    device : torch.device or str
        Device on which both are called.
    ignore_index : int, optional
        Label of rows that must not count. Some rows then have it, and torch's own losses as reference receive it.
    soft_targets : bool
        target_probs are distributions instead of one-hot.
    tokens : bool
        Logits are [B, T, C] and labels [B, T].
    num_classes : sequence of int, optional
        The C to test; by default 2 to 50 000, and 2 to 128 256 for fused and token losses.
    batches : sequence of AuditBatch
        Your own batches from `capture`, in addition to the grid.

    Returns
    -------
    Finding
        The word (`objective`), the reason (`sentence`), factor, offset, limits and side effects.

    Raises
    ------
    UsageError
        The request is wrong; the message is one line with a remedy.

    References
    ----------
    Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019).

    Examples
    --------
    >>> import torch.nn.functional as F
    >>> from likelihood_lab import check
    >>> check(lambda z, y: F.nll_loss(z.log_softmax(1), y), num_classes=(2, 10)).objective
    'identical'
    """
    for key, names in (("args", args), ("reference_args", reference_args)):
        _check_args(key, names)
    for key, loss in (("fn", fn), ("reference", reference)):
        if isinstance(loss, type) or not callable(loss):
            raise UsageError(f"{key} is {loss!r}; give a function, or an instance such as torch.nn.CrossEntropyLoss()")
    if isinstance(fn, torch.nn.Module) and any(parameter.requires_grad for parameter in fn.parameters()):
        raise UsageError("fn has trainable parameters of its own; a loss is a fixed function: freeze them")
    if ignore_index is not None and not isinstance(ignore_index, int):
        raise UsageError(f"ignore_index={ignore_index!r}; give an integer such as -100, or nothing")
    if not isinstance(batches, Sequence):
        raise UsageError(f"batches={batches!r}; give the batches of `capture`")
    if isinstance(num_classes, str) or not (num_classes is None or isinstance(num_classes, Sequence)):
        raise UsageError(f"num_classes={num_classes!r}; give a tuple such as (10,)")
    settings: dict[str, Any] = {
        "dtype": dtype, "device": device_of(device), "ignore_index": ignore_index, "soft_targets": soft_targets,
        "tokens": tokens, "num_classes": None if num_classes is None else tuple(num_classes),
    }  # fmt: skip
    reference = _ignoring(reference, ignore_index)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(settings["device"].type, enabled=False):
        audit = _audit(Loss(reference, tuple(reference_args)), tuple(args), settings, batches)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        finding = examine(audit, Loss(fn, tuple(args)))
    line = next((line for line in printed.getvalue().splitlines() if line.strip()), None)
    if line is None:
        return finding
    return replace(finding, side_effects=(*finding.side_effects, f"prints: {line.strip()[:80]}"))


def assert_same_loss(fn: LossFn, reference: LossFn = F.cross_entropy, **settings: Any) -> None:
    """Fail unless `fn` trains as `reference` does: identical, equal up to rounding, or offset by a constant value.

    Parameters
    ----------
    fn : callable
        Returns the scalar objective, or a tuple that begins with it.
    reference : callable
        Usually the mean cross-entropy in nats.
    **settings
        The other parameters of `check`.

    Raises
    ------
    AssertionError
        The message is the finding's sentence and a few lines of code that reproduce the difference.
    UsageError
        The request is wrong; the message is one line with a remedy.

    Examples
    --------
    >>> import torch.nn.functional as F
    >>> from likelihood_lab import assert_same_loss
    >>> assert_same_loss(lambda z, y: F.nll_loss(z.log_softmax(1), y), F.cross_entropy, num_classes=(2, 10))
    """
    __tracebackhide__ = True  # pytest then omits this frame
    finding = check(fn, reference, **settings)
    if not (finding.same and finding.value_holds):
        effects = [effect for effect in finding.side_effects if effect.startswith("value")]
        message = "; ".join([f"{finding.objective}: {finding.sentence}", *effects])
        raise AssertionError("\n\n".join(filter(None, [message, reproduction(fn, reference, finding, settings)])))


def _check_args(key: str, names: Sequence[str]) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError(f"{key}={names!r}; give a tuple such as ('logits', 'labels')")
    for name in names:
        if name not in INPUTS:
            raise UsageError(f"{key} names {name!r}{did_you_mean(name, INPUTS)}; choose from {', '.join(INPUTS)}")
    if not names:
        raise UsageError(f"{key} is empty; choose from {', '.join(INPUTS)}")


def _ignoring(reference: LossFn, ignore_index: int | None) -> LossFn:
    """Return the reference with its ignore_index; the same object each time, so that its cached audit is used."""
    if not inspect.isroutine(reference):
        return with_ignored(reference, ignore_index)
    return _with_ignore.setdefault((reference, ignore_index), with_ignored(reference, ignore_index))


def _audit(
    reference: Loss, args: tuple[str, ...], settings: dict[str, Any], batches: Sequence[AuditBatch]
) -> AuditContext:
    """Return an audit, from the cache if the last one had the same reference and settings."""
    if batches or not inspect.isroutine(getattr(reference.fn, "func", reference.fn)):  # a module may change
        return audit_of(reference, args, **settings, batches=list(batches))
    fused = tuple(sorted({"hidden", "weight", "bias"} & {*args, *reference.args}))
    key = (reference.fn, reference.args, fused, *(str(value) for value in settings.values()))
    try:
        if key not in _audits:
            _audits.clear()  # only one: it holds all gradients of the reference
            _audits[key] = audit_of(reference, args, **settings)
        return _audits[key]
    except TypeError as error:  # the reference is not hashable
        if "unhashable" not in first_line(error):
            raise
        return audit_of(reference, args, **settings)


def reproduction(fn: LossFn, reference: LossFn, finding: Finding, settings: Mapping[str, Any]) -> str:
    """Return code that shows the difference on the simplest batch; empty if there is no such batch."""
    if finding.worst is None:
        return ""
    batch, dtype = finding.worst
    args = tuple(settings.get("args", ("logits", "labels")))
    reference_args = tuple(settings.get("reference_args", ("logits", "labels")))
    if batch.hidden is not None or batch.logits.numel() > LITERAL or not batch.contiguous:
        shown = [f"{key}={value!r}" for key, value in settings.items() if key != "batches"]
        call = f"check({', '.join(['mine', _name(reference, 'reference'), *shown])})"
        return (
            f"# the smallest batch that shows it: {dtype}, {batch.where}\n"
            f"batch, dtype = likelihood_lab.{call}.worst  # batch.logits, .labels, .hidden, .weight"
        )
    logits = batch.logits.tolist()
    lines = [
        "import torch; import torch.nn.functional as F",
        f"z = torch.tensor({logits}, dtype=torch.{dtype}, requires_grad=True)",
    ]
    if "labels" in (*args, *reference_args):
        lines.append(f"labels = torch.tensor({batch.labels.tolist()})")
    if "target_probs" in (*args, *reference_args):
        lines.append(f"target_probs = torch.tensor({batch.target_probs.tolist()}, dtype=torch.{dtype})")
    upstream = f", torch.tensor({batch.upstream}, dtype=torch.{dtype})" if batch.upstream != 1 else ""
    for loss, default in ((Loss(reference, reference_args), "reference"), (Loss(fn, args), "mine")):
        name, flat = _name(loss.fn, default), loss.flattens and batch.labels.ndim > 1
        expressions = [_expression(arg, flat) for arg in loss.args]
        if default == "reference" and loss.fn is F.cross_entropy and settings.get("ignore_index") is not None:
            expressions.append(f"ignore_index={settings['ignore_index']}")
        lines.append(f"print(torch.autograd.grad({name}({', '.join(expressions)}), z{upstream})[0].tolist())")
    return "\n".join(lines)


def _expression(arg: str, flat: bool) -> str:
    made = {"logits": "z", "log_probs": "z.log_softmax(-1)", "probs": "z.softmax(-1)"}.get(arg, arg)
    return made + (".flatten()" if arg == "labels" else ".flatten(0, -2)") if flat else made


def _name(fn: LossFn, default: str) -> str:
    """Return "F.name" for torch's own functions, and `default` for others."""
    name = getattr(fn, "__name__", "")
    return f"F.{name}" if name and getattr(F, name, None) is fn else default
