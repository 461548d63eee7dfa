"""The pytest plugin: a fixture, so that a test of a loss is one line and imports nothing.

def test_my_loss(assert_same_loss):
    assert_same_loss(my_cross_entropy)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def assert_same_loss() -> Callable[..., None]:
    """`likelihood_lab.assert_same_loss`; torch is imported by the first test that asks for it."""
    from likelihood_lab.audit.api import assert_same_loss

    return assert_same_loss
