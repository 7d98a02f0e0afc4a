"""Where the host reads values of the device."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
ROOMS = [(ROOT / name).resolve() for name in ("dino_head", "callbacks", "examples")]
TORCH = Path(torch.__file__).parent
aten = torch.ops.aten
# Each makes the host wait for a GPU: the result is a Python value, or its shape depends on values.
READS = {
    aten._local_scalar_dense,
    aten.item,  # in a custom operator, where it is not decomposed
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
METHODS = ("cpu", "tolist", "numpy")  # on the CPU, they dispatch no operation


class HostReads(TorchDispatchMode):
    """Counts reads by (file, function): the innermost frame outside torch, if it is in one of the rooms.

    It also counts those in custom operators, whose functions it calls itself.

    Args:
        rooms: Folders and files.
    """

    def __init__(self, rooms: list[Path] = ROOMS) -> None:
        super().__init__()
        self.rooms, self.counts = rooms, Counter[tuple[str, str]]()

    def __enter__(self) -> "HostReads":
        self.methods = {name: getattr(torch.Tensor, name) for name in METHODS}
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, self._noting(method))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS:
            self._note()
        custom = OPDEFS.get(func._schema.name)
        if custom is not None:
            super().__enter__()
            try:
                return custom._init_fn(*args, **(kwargs or {}))
            finally:
                super().__exit__(None, None, None)
        return func(*args, **(kwargs or {}))

    def _noting(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._note()
            return method(*args, **kwargs)

        return call

    def _note(self) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None:
            file, name = Path(frame.f_code.co_filename).resolve(), frame.f_code.co_name
            is_own_frame = name.startswith("<")  # of a comprehension, before Python 3.12
            if file != Path(__file__).resolve() and TORCH not in file.parents and not is_own_frame:
                break
            frame = frame.f_back
        if frame is not None and any(room == file or room in file.parents for room in self.rooms):
            self.counts[file.name, name] += 1
