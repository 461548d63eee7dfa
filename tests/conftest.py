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


@pytest.fixture(autouse=True, scope="session")
def _cache_and_store_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests remember, a user must not recall; and nothing of theirs goes to a user's store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("LIKELIHOOD_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As the pipeline trains, whichever test comes first: with two, bits may depend on a replica's slot."""
    import torch

    torch.set_num_threads(1)
