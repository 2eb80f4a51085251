import pytest
from distributed_cases import Ranks
from torch import distributed


@pytest.fixture(scope="session")
def ranks():
    """Two processes, for all tests that want them."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    with Ranks() as started:
        yield started
