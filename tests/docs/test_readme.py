"""The README's generated blocks: what stands there is what the record says."""

from __future__ import annotations

import pytest
import yaml

from experiments.readme import FIGURE_LOSSES, BLOCKS, FIGURE, README, ROOT, cut, description_of, verdicts, with_block, write
from likelihood_lab.errors import UsageError
from pipeline.loss_audit.losses import AuditSettings, audit_losses

PRINTED = """
d: each loss against ce
                                     \x20
  loss   verdict     objective       \x20
 ──────────────────────────────      \x20
  nll    identical   identical       \x20
                                     \x20
nll: The same function, bit for bit.
"""


def test_the_table_of_verdicts_is_that_of_the_record() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_block(text, "verdicts", verdicts()) == text


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")  # kl_mean's very point
def test_the_words_of_the_audit_s_block_are_those_that_an_audit_finds_now() -> None:
    text = README.read_text(encoding="utf-8")
    block = text.split("<!-- generated: audit -->")[1].split("<!-- end: audit -->")[0]
    rows = [line.split() for line in block.splitlines() if line.startswith("  ") and "objective" not in line]
    losses = {name: yaml.safe_load((ROOT / f"conf/loss/{name}.yaml").read_text())[name] for name in FIGURE_LOSSES}
    found = audit_losses(losses, "ce", AuditSettings())["losses"]
    assert {row[0]: row[1] for row in rows} == {name: entry["objective"] for name, entry in found.items()}


def test_every_block_is_filled_and_the_figure_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    for name in BLOCKS:
        block = text.split(f"<!-- generated: {name} -->")[1].split(f"<!-- end: {name} -->")[0]
        assert len(block.splitlines()) > 4, name
    assert f"({FIGURE.relative_to(README.parent)})" in text
    assert FIGURE.read_text(encoding="utf-8").startswith("<svg ")


def test_a_table_is_cut_out_of_what_a_command_prints() -> None:
    assert cut(PRINTED).splitlines()[0] == "  loss   verdict     objective"
    assert len(cut(PRINTED).splitlines()) == 3


def test_a_loss_is_said_by_the_first_sentence_of_its_file() -> None:
    assert (
        description_of("kl_mean")
        == "torch's default reduction divides by batch x classes: the gradient is 1/C of the right one"
    )
    assert description_of("kl") == "D_KL(labels \\|\\| model)"  # a pipe would end the table's cell


@pytest.mark.parametrize(
    "text", ["", "<!-- end: a --> <!-- generated: a -->", "<!-- generated: a --><!-- generated: a -->"]
)
def test_a_readme_without_its_marks_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"README\.md needs <!-- generated: a -->"):
        with_block(text, "a", "content")


def test_a_block_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"no block is called verdict \(did you mean 'verdicts'"):
        write(["verdict"])
