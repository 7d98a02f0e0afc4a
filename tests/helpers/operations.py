from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Notes the largest result of any operation, in elements, and counts the products of matrices."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, result.numel())
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return result


class _NoReads(TorchDispatchMode):
    aten = torch.ops.aten
    reads = (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.reads:
            _refuse_read(function)
        return function(*args, **(kwargs or {}))


def _refuse_read(_):
    raise RuntimeError("the host reads a value of a tensor, and would wait for a GPU")


@contextmanager
def without_reads():
    """Raise RuntimeError if the host reads a value of a tensor, on any device."""
    with _NoReads(), mock.patch.object(torch.Tensor, "tolist", _refuse_read):
        yield
