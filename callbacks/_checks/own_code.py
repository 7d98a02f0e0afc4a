"""Whether the user's own code may update a teacher, inferred from the names that it uses."""

from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

LIBRARIES = ("torch", "lightning", "pytorch_lightning", "dino_head", "transformers", "timm", "builtins")
UNRELATED = ("__init__", "setup", "configure_optimizers", "configure_model", "forward")
WRITES = ("data", "load_state_dict", "update_parameters", "deepcopy")


def may_write(objects: Iterable[object]) -> bool:
    """Whether a function of these objects, or one that it calls by name, uses in-place methods or averages.

    A name is enough: the answer only decides how long to wait for an update.
    """
    waiting = [function for owner in objects for function in _functions_of(owner)]
    seen: set[FunctionType] = set()
    while waiting:
        function = waiting.pop()
        if function in seen or _is_of_library(function):
            continue
        seen.add(function)
        names = set(_names_in(function.__code__))
        if any(map(_writes, names)):
            return True
        called = (function.__globals__.get(name) for name in names)
        waiting += [other for other in called if isinstance(other, FunctionType)]
    return False


def _functions_of(owner: object) -> Iterator[FunctionType]:
    spaces: list[Any] = [vars(owner), *(vars(kind) for kind in type(owner).__mro__ if not _is_of_library(kind))]
    for space in spaces:
        for name, value in space.items():
            function = getattr(value, "__func__", value)
            if isinstance(function, FunctionType) and name not in UNRELATED:
                yield function


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _writes(name: str) -> bool:
    is_in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return is_in_place or name in WRITES or "momentum" in name or "ema" in name.lower().split("_")


def _is_of_library(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] in LIBRARIES
