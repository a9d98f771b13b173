"""What every test of this tier finds, and leaves as it found it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Models are so tiny that a second thread only waits, for minutes where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """transformers sets it while it builds a model; left behind, it would spoil whatever test comes next."""
    yield
    found = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert found == torch.float32, "the default dtype was left changed"
