import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: each worker, and what it starts, has one core


SLOW_FOLDERS = {"examples", "cli"}  # they train, or start the command line


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in SLOW_FOLDERS and item.path.name.startswith("test_"):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
