from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def untouched_randomness() -> Iterator[None]:
    """Fail the test if it changes the state of torch's global generator."""
    import torch

    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random state moved"


@pytest.fixture(autouse=True, scope="session")
def _own_cache_and_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from the user's cache and tracking store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread, as the pipeline does: with two, bits may depend on a replica's slot."""
    import torch

    torch.set_num_threads(1)
