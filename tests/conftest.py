"""Shared by all tests: one thread, and nothing learnt by Dynamo in another test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_torch():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    """An empty store for each test: what it counts was compiled in it."""
    monkeypatch.setattr("splitpoint.store.store_folder", lambda: tmp_path / "store")


@pytest.fixture
def fresh_inductor_cache(tmp_path, monkeypatch):
    """An empty Inductor cache, so that passes are seen to run."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield
