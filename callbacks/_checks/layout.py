"""Names, parameters and observed values of a LightningModule, and the pairs of student and teacher in it."""

import difflib
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dino_head.head import DINOProjectionHead

PAIRS = 'pairs=(("student", "teacher"),)'  # the argument, as errors show it
DEFAULT = (("student", "teacher"),)
Pairs = Sequence[tuple[str, str]]  # names of (student, teacher) submodules

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def find_submodule(pl_module: LightningModule, name: str, argument: str) -> nn.Module:
    """`pl_module.get_submodule(name)`, with an error that names the argument and the submodules that exist."""
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(child for child, _ in pl_module.named_children())
        frozen = {name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad}
        trained = {name for name, _ in pl_module.named_parameters()} - frozen
        pairs = matching_pairs(pl_module, frozen, trained)
        proposal = f", here {as_arguments(pl_module, pairs)}" if pairs else ""
        raise MisconfigurationException(
            f"{type(pl_module).__name__} has no submodule {name!r} ({error}); it has {children}: set names as "
            f"named_modules() lists them, with {argument}{proposal}"
        ) from None


def local_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that may be sharded: a view of the parameter's memory, without gradient."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def without_compile(name: str) -> str:
    """A parameter's name without the parts that `torch.compile` adds."""
    return name.replace("_orig_mod.", "")


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """One int64 for each tensor, on its device: the sum of its bits read as integers. It is equal for equal tensors."""
    parts = [local_part(tensor).contiguous() for tensor in tensors]
    return torch.stack([part.view(INTEGERS[part.element_size()]).sum() for part in parts])


def read(values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[float]:
    """Reduce small values (N,) over all processes on the device, and copy them to the host, once."""
    values = values.to(torch.float32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, op)
    found: list[float] = values.tolist()
    return found


def matching_pairs(
    pl_module: nn.Module, teachers: Collection[str], students: Collection[str], others: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Names of the largest modules of teachers, each with the student of equal structure whose name is most similar.

    Args:
        pl_module: Module that contains both sides.
        teachers: Names of the parameters of teachers. A teacher module contains only these, a student module none.
        students: Names of parameters that are trained. A teacher whose student has none of them is skipped.
        others: Names of further parameters that no student contains.
    """
    shapes = {name: parameter.shape for name, parameter in pl_module.named_parameters()}
    parts = {
        module: {
            without_compile(name.removeprefix(f"{module}.")): name for name in shapes if name.startswith(f"{module}.")
        }
        for module, _ in pl_module.named_modules()
        if module
    }
    found: dict[str, str] = {}  # students by teachers
    for teacher, own in parts.items():  # parents come before their children
        is_covered = any(teacher.startswith(f"{other}.") for other in found)
        if is_covered or not own or not set(own.values()) <= set(teachers):
            continue
        candidates = [
            (len(theirs) == len(own), difflib.SequenceMatcher(None, student, teacher).ratio(), student)
            for student, theirs in parts.items()
            if set(theirs.values()).isdisjoint({*teachers, *others})
            and all(name in theirs and shapes[theirs[name]] == shapes[own[name]] for name in own)
        ]
        if candidates:
            found[teacher] = max(candidates)[2]
    return [
        (student, teacher)
        for teacher, student in found.items()
        if any(parts[student][name] in students for name in parts[teacher])
    ]


def as_arguments(pl_module: nn.Module, pairs: Pairs) -> str:
    """The arguments of our callbacks for these pairs, as code."""
    written = ", ".join(f'("{student}", "{teacher}")' for student, teacher in pairs)
    arguments = f"TeacherUpdateCallback({'' if tuple(pairs) == DEFAULT else f'pairs=({written},)'})"
    backbone = next((name for _, teacher in pairs if (name := _without_head(pl_module, teacher))), None)
    if backbone not in (None, "teacher.backbone"):
        arguments += f', KNNProbeCallback(module="{backbone}"), ReportCallback(module="{backbone}")'
    return arguments


def _without_head(pl_module: nn.Module, teacher: str) -> str | None:
    """The part of a teacher in front of its head; None for a head."""
    part = None
    for name, module in [("", pl_module.get_submodule(teacher)), *pl_module.get_submodule(teacher).named_children()]:
        if isinstance(module, DINOProjectionHead):
            return part
        part = f"{teacher}.{name}".rstrip(".")
    return teacher
