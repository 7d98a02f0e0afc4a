import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: each worker, and what it starts, has one core


@pytest.hookimpl
def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
