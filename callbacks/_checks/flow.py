"""Finding the parameters from which an output was computed."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_SCHEMA = SimpleNamespace(arguments=())  # of higher-order operators


class Flow(TorchDispatchMode):
    """While it is active, follows parameters through all operations, including those without gradients.

    It also follows them through compiled functions, which run uncompiled while it is active.

    Args:
        parameters: Parameters by name. Those that share memory count as one.
    """

    supports_higher_order_operators = True
    _parameters: frozenset[int] = frozenset()

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = list(parameters)
        # By address; the weak reference keeps the address from being used again. The sources are bits of an integer.
        self._sources: dict[int, tuple[StorageWeakRef, int]] = {}
        for index, parameter in enumerate(parameters.values()):
            self._add(parameter, 1 << index)
        self._parameters = frozenset(self._sources)  # which keep their sources when an optimizer writes to them

    def sources(self, *tensors: Tensor) -> set[str]:
        """Names of the parameters that these tensors were computed from."""
        bits = self._bits(tensors)
        return {name for index, name in enumerate(self.names) if bits >> index & 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        bits = self._bits(tree_leaves((args, kwargs)))
        if bits:
            written = [
                value
                for argument, value in zip(getattr(func, "_schema", NO_SCHEMA).arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            for tensor in tree_leaves((result, written)):
                if isinstance(tensor, Tensor):
                    self._add(tensor, bits)
        return result

    def _bits(self, values: Any) -> int:
        bits = 0
        for value in values:
            if isinstance(value, Tensor) and (storage := _storage(value)) is not None:
                bits |= self._sources.get(storage._cdata, (None, 0))[1]
        return bits

    def _add(self, tensor: Tensor, bits: int) -> None:
        storage = _storage(tensor)
        if storage is not None and storage._cdata not in self._parameters:
            reference, before = self._sources.get(storage._cdata, (None, 0))
            self._sources[storage._cdata] = reference or StorageWeakRef(storage), before | bits


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """None for sparse and other tensors without one, through which nothing is followed."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):  # ValueError: not yet initialized
        return None
