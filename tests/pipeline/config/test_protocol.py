"""The protocol group, the keys of earlier versions, and a help that names every key."""

from __future__ import annotations

import subprocess
import sys

import pytest

from likelihood_lab.errors import UsageError
from pipeline.config import schema as conf
from pipeline.config.hydra_glue import INTERNAL_KEYS
from tests.trials import compose


@pytest.mark.parametrize("key", ["alpha=0.1", "looks=2", "max_seeds=40", "controls=none", "vary=bit"])
def test_old_key_names_the_new_one(key: str) -> None:
    with pytest.raises(UsageError) as refused:
        compose(f"+{key}")
    assert str(refused.value) == f"the key '{key.partition('=')[0]}' is now protocol.{key.partition('=')[0]}"


@pytest.mark.parametrize(("key", "instead"), [("until=decided", "protocol.max_seeds"), ("rank_test=9", "trajectory")])
def test_removed_key_says_what_to_use(key: str, instead: str) -> None:
    with pytest.raises(UsageError, match=instead):
        compose(f"+{key}")


def test_old_key_without_plus_is_one_line() -> None:
    command = [sys.executable, "-m", "pipeline.train", "alpha=0.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: the key 'alpha' is now protocol.alpha\n")


@pytest.mark.parametrize("key", ["+shar=1", "+epoch=1"])
def test_internal_keys_are_not_offered(key: str) -> None:
    with pytest.raises(UsageError, match="the keys are: loss") as refused:
        compose(key)
    assert "share" not in str(refused.value).replace("'shar'", "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["protocol.max_seeds=40"], "protocol.looks=2"),
        (["protocol.max_seeds=1", "protocol.looks=2"], "protocol.max_seeds=1; it must be at least 2"),
        (["protocol.looks=0"], "protocol.looks=0; it must be at least 1"),
        (["protocol.alpha=0.5"], "protocol.alpha=0.5; it must lie between 0 and 0.5"),
        (["+protocol.alfa=1"], "unknown key 'protocol.alfa' (did you mean 'alpha'?)"),
    ],
)
def test_wrong_protocol_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        compose(*overrides)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("command", "schema"), [("pipeline.train", conf.TrainConf), ("pipeline.audit", conf.AuditConf)]
)
def test_help_names_every_key(command: str, schema: type) -> None:
    shown = subprocess.run([sys.executable, "-m", command, "--help"], capture_output=True, text=True, check=True).stdout
    groups = {"trainer": conf.TrainerConf, "protocol": conf.ProtocolConf}
    for key in schema.__dataclass_fields__.keys() - {*INTERNAL_KEYS}:
        names = [f"{key}.{field}" for field in groups[key].__dataclass_fields__] if key in groups else [key]
        assert [name for name in names if name not in shown] == []
