from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def untouched_randomness() -> Iterator[None]:
    """Fails the test if torch's global generator stands elsewhere afterwards."""
    import torch

    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random state moved"
