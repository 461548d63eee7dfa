"""Pytest plugin with the fixture `assert_same_loss`, so that a test of a loss needs no import.

def test_my_loss(assert_same_loss):
    assert_same_loss(my_cross_entropy)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def assert_same_loss() -> Callable[..., None]:
    """Return `likelihood_lab.assert_same_loss`. The first test that uses it imports torch."""
    from likelihood_lab.audit.api import assert_same_loss

    return assert_same_loss
