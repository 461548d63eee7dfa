"""Check the README's generated blocks against the recorded results and a fresh audit."""

from __future__ import annotations

import pytest
import yaml

from experiments.readme import (
    BLOCKS,
    FIGURE,
    FIGURE_LOSSES,
    README,
    ROOT,
    cut,
    description_of,
    verdicts,
    with_block,
    write,
)
from likelihood_lab.errors import UsageError
from pipeline.loss_audit.losses import AuditSettings, audit_losses

TEXT = README.read_text(encoding="utf-8")
PRINTED = """
d: each loss against ce
                                     \x20
  loss   verdict     objective       \x20
 ──────────────────────────────      \x20
  nll    identical   identical       \x20
                                     \x20
nll: The same function, bit for bit.
"""


def block_lines(name: str) -> list[str]:
    return TEXT.split(f"<!-- generated: {name} -->")[1].split(f"<!-- end: {name} -->")[0].splitlines()


def test_verdicts_block_is_that_of_the_record() -> None:
    assert with_block(TEXT, "verdicts", verdicts()) == TEXT


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # intended in kl_mean
def test_audit_block_has_the_words_of_a_fresh_audit() -> None:
    rows = [line.split() for line in block_lines("audit") if line.startswith("  ") and "objective" not in line]
    losses = {name: yaml.safe_load((ROOT / f"conf/loss/{name}.yaml").read_text())[name] for name in FIGURE_LOSSES}
    results = audit_losses(losses, "ce", AuditSettings())["losses"]
    assert {row[0]: row[1] for row in rows} == {name: entry["objective"] for name, entry in results.items()}


def test_blocks_are_filled_and_the_figure_exists() -> None:
    assert all(len(block_lines(name)) > 4 for name in BLOCKS)
    assert f"({FIGURE.relative_to(README.parent)})" in TEXT
    assert FIGURE.read_text(encoding="utf-8").startswith("<svg ")


def test_cut_keeps_only_the_table() -> None:
    header, *rows = cut(PRINTED).splitlines()
    assert header == "  loss   verdict     objective"
    assert len(rows) == 2


def test_description_is_the_first_sentence_of_the_loss_file() -> None:
    first = "KL with the default reduction of torch, which divides by batch x classes: 1/C of the correct gradient"
    assert description_of("kl_mean") == first
    assert description_of("kl") == "D_KL(labels \\|\\| model)"  # a pipe would end the table's cell
    assert "64 times as large" in description_of("log_likelihood")


@pytest.mark.parametrize(
    "text", ["", "<!-- end: a --> <!-- generated: a -->", "<!-- generated: a --><!-- generated: a -->"]
)
def test_with_block_refuses_a_text_without_the_marks(text: str) -> None:
    with pytest.raises(UsageError, match=r"README\.md needs <!-- generated: a -->"):
        with_block(text, "a", "content")


def test_write_refuses_an_unknown_block() -> None:
    with pytest.raises(UsageError, match=r"no block is called verdict \(did you mean 'verdicts'"):
        write(["verdict"])
