"""States that `torch.testing.assert_close` can compare."""

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection


def comparable(state: Any) -> Any:
    """The state with texts, such as the names of parameter groups, as numbers."""
    return apply_to_collection(state, str, lambda text: list(text.encode()))
