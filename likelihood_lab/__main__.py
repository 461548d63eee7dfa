"""Command line of the audit: python -m likelihood_lab check MODULE:FUNCTION.

Exit codes: 0 same loss, 1 another loss, 2 wrong request, 3 a fault of this program, 130 interrupted.

Example: `python -m likelihood_lab check my_losses:focal --num-classes 2,10 --json`
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from likelihood_lab.errors import UsageError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch

SAME, NOT_SAME, USAGE, FAULT, INTERRUPTED = 0, 1, 2, 3, 130
DTYPES = ("bfloat16", "float16", "float32", "float64")
CROSS_ENTROPY = "torch.nn.functional:cross_entropy"


class _Parser(argparse.ArgumentParser):
    """Argument parser that reports errors as UsageError, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = _Parser(prog="likelihood_lab", description="Is it the same loss?")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    about = "compare a loss with a reference, by gradients and values; exit code 0 same, 1 not, 2 wrong request"
    check = commands.add_parser("check", help=about, description=about)
    check.add_argument("loss", metavar="MODULE:FUNCTION", help="the loss; the current folder is importable")
    check.add_argument("--reference", default=CROSS_ENTROPY, metavar="MODULE:FUNCTION", help="default: %(default)s")
    inputs = "of logits, log_probs, probs, hidden, weight, bias, labels, target_probs; default: logits,labels"
    check.add_argument("--args", type=_names, metavar="A,B", help=f"inputs of the loss, in its own order: {inputs}")
    check.add_argument("--reference-args", type=_names, metavar="A,B", help="the same for the reference")
    check.add_argument("--dtype", metavar="DTYPE", help=f"use only this precision: {', '.join(DTYPES)}")
    check.add_argument("--device", default="cpu", help="default: %(default)s")
    check.add_argument("--ignore-index", type=int, metavar="N", help="rows with this label must not count")
    check.add_argument("--soft-targets", action="store_true", help="target_probs are distributions, not one-hot")
    check.add_argument("--tokens", action="store_true", help="logits are [B, T, C], labels [B, T]")
    check.add_argument("--num-classes", type=_numbers, metavar="C,C", help="the numbers of classes to test")
    check.add_argument("--json", action="store_true", help="print strict JSON and nothing else")
    return root


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 2,10") from None


def load(path: str) -> Any:
    """Import the object MODULE:NAME. The current folder is searched first.

    Raises
    ------
    UsageError
        The module or the name does not exist, or the import fails.
    """
    module, _, name = path.partition(":")
    if not module or not name or module.endswith(".py") or "/" in module:
        dotted = module.removesuffix(".py").strip("./").replace("/", ".") or "my_losses"
        raise UsageError(f"{path!r} names no function; give MODULE:FUNCTION, such as {dotted}:{name or 'my_loss'}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise UsageError(f"no module {module!r} here or on PYTHONPATH; check the spelling") from error
        raise UsageError(f"{module} cannot be imported: {first_line(error)}; install what it needs") from error
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{module} cannot be imported: {text}; correct it first") from error
    try:
        return attrgetter(name)(owner)
    except AttributeError:
        hint = did_you_mean(name, (known for known in dir(owner) if callable(getattr(owner, known))))
        raise UsageError(f"{module} has no {name!r}{hint}") from None


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    if name is not None and name not in DTYPES:
        raise UsageError(f"--dtype {name}{did_you_mean(name, DTYPES)}: choose from {', '.join(DTYPES)}")
    return None if name is None else getattr(torch, name)


def check(options: argparse.Namespace, output: TextIO) -> int:
    """Audit the loss, print the finding, and return the exit code."""
    fn, reference = load(options.loss), load(options.reference)
    import torch

    from likelihood_lab.audit.api import LOGITS_AND_LABELS, check, reproduction

    torch.set_num_threads(1)  # the tensors are small; more threads are slower
    settings = {
        "args": options.args or LOGITS_AND_LABELS, "reference_args": options.reference_args or LOGITS_AND_LABELS,
        "dtype": _dtype(options.dtype), "device": options.device, "ignore_index": options.ignore_index,
        "soft_targets": options.soft_targets, "tokens": options.tokens, "num_classes": options.num_classes,
    }  # fmt: skip
    finding = check(fn, reference, **settings)
    same = finding.same and finding.value_holds
    if options.json:
        entry = {"loss": options.loss, "reference": options.reference, "same": same, **finding.as_json()}
        print(json.dumps(entry, indent=2, allow_nan=False), file=output)
    else:
        shown = "" if same else reproduction(fn, reference, finding, settings)
        print("\n\n".join(filter(None, [finding.show(), shown])), file=output)
    output.flush()
    return SAME if same else NOT_SAME


@contextlib.contextmanager
def _reserved_output(reserve: bool) -> Iterator[TextIO]:
    """Yield the standard output. If reserved, everything that others print goes to the standard error."""
    if not reserve:
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)
        yield output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        options = parser().parse_args(arguments)
        with _reserved_output(options.json) as output:
            return check(options, output)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return FAULT


if __name__ == "__main__":
    sys.exit(main())
