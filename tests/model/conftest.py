"""What every test of this tier leaves as it found it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    """transformers sets it while it builds a model; left behind, it would spoil whatever test comes next."""
    yield
    found = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert found == torch.float32, "the default dtype was left changed"
