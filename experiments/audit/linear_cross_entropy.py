"""Audit torch's fused `linear_cross_entropy` with every chunking and accumulation that the CPU supports.

python -m experiments.audit.linear_cross_entropy
"""

from __future__ import annotations

import os
import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions as Options

from experiments.audit.tables import environment, markdown
from likelihood_lab.audit.api import check
from likelihood_lab.audit.finding import Finding

FUSED = ("hidden", "weight", "labels")
WITH_BIAS = (*FUSED, "bias")
IGNORED = -100
CHUNK = 5  # rows: does not divide the batches
CLASSES = (2, 10, 1000, 20_000)

WAYS: dict[str, Options | None] = {
    "options=None": None,
    "Options()": Options(),
    f"batch_chunk_size={CHUNK}": Options(batch_chunk_size=CHUNK),
    f"batch_chunk_size={CHUNK}, compact": Options(batch_chunk_size=CHUNK, acc_policy="compact"),
    f"batch_chunk_size={CHUNK}, accurate": Options(batch_chunk_size=CHUNK, acc_policy="accurate"),
    "chunking_method=aspect_ratio:4": Options(chunking_method="aspect_ratio:4"),
    f"batch_chunk_size={CHUNK}, allow_retain_graph": Options(batch_chunk_size=CHUNK, allow_retain_graph=True),
}
LOW: dict[str, Options | None] = WAYS | {
    f"batch_chunk_size={CHUNK}, compact, acc float32": Options(
        batch_chunk_size=CHUNK, acc_policy="compact", acc_dtype=torch.float32
    ),
    f"batch_chunk_size={CHUNK}, accurate, acc float32": Options(
        batch_chunk_size=CHUNK, acc_policy="accurate", acc_dtype=torch.float32
    ),
}


@dataclass(frozen=True)
class Question:
    """One way to call `linear_cross_entropy`.

    Attributes:
        settings: further keywords of `check`.
    """

    precision: str
    way: str
    options: Options | None
    bias: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Short name of the call."""
        more = [name for name, held in (("bias", self.bias), ("ignored rows", "ignore_index" in self.settings)) if held]
        return ", ".join([self.way, *more])

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Call torch's own loss."""
        return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, options=self.options)


def questions() -> Iterator[Question]:
    """Return calls with and without a bias and with ignored rows; float32 and float64, then bfloat16 and float16."""
    for way, options in WAYS.items():
        for bias in (False, True):
            yield Question("float32, float64", way, options, bias)
    for way in (f"batch_chunk_size={CHUNK}", "options=None"):
        yield Question("float32, float64", way, WAYS[way], settings={"ignore_index": IGNORED})
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for way, options in LOW.items():
            yield Question(name, way, options, settings={"dtype": dtype})
        yield Question(name, "Options()", Options(), True, {"dtype": dtype})


def ask(question: Question) -> Finding:
    """Audit a call against a linear layer followed by cross-entropy."""
    args = WITH_BIAS if question.bias else FUSED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check(question, args=args, num_classes=CLASSES, **question.settings)


def main() -> None:
    """Print a line for every call, and what holds for all."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start = time.perf_counter()
    asked = sorted(questions(), key=lambda q: (q.precision, q.bias, "ignore_index" in q.settings))
    found = [(question, ask(question)) for question in asked]
    print(f"# torch's linear_cross_entropy\n\n{environment()}. C = {', '.join(map(str, CLASSES))}.\n")
    rows = [[q.precision, q.title, finding.objective, finding.sentence] for q, finding in found]
    print(markdown(["precision", "called with", "objective", "sentence"], rows))
    words = sorted({finding.objective for _, finding in found})
    chunked = [finding for q, finding in found if q.options is not None]
    once = sum("refuses a second backward" in finding.side_effects for finding in chunked)
    same = sum(finding.same for _, finding in found)
    print(
        f"\n{same} of {len(found)} ways are called the same ({', '.join(words)}); "
        f"{once} of {len(chunked)} chunked ones refuse a second backward."
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nPeak memory {peak:.1f} GiB, {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
