from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from splitpoint import kernels


@pytest.fixture(scope="session")
def built() -> None:
    """The kernels, loaded; fails rather than skips, as the tests need a compiler anyway."""
    kernels.load()


@pytest.fixture
def poisoned(built: None) -> Iterator[None]:
    """Fresh memory holds NaN, so what a kernel forgets to write shows; settings are put back."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    kernels.use_instruction_set("best")
