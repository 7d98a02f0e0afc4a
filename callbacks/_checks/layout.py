"""Names, parameters and observed values of a LightningModule, and the pairs of student and teacher in it."""

import difflib
import re
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from dino_head.head import DINOProjectionHead
from dino_head.losses import has_processes

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
        remedy = f"set a name as named_modules() lists it, with {argument}"
        if argument == PAIRS and pairs:
            remedy = f"use {as_code(pairs)}.{settings_for(pl_module, pairs)}"
        raise MisconfigurationException(
            f"{type(pl_module).__name__} has no submodule {name!r} ({error}); it has {children}: {remedy}"
        ) from None


def local_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that may be sharded: a view of the parameter's memory, without gradient."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def without_compile(name: str) -> str:
    """A parameter's name without the parts that `torch.compile` adds."""
    return name.replace("_orig_mod.", "")


def address_of(parameter: Tensor) -> int:
    """The address of the memory that a parameter is a view of; its id if it has none."""
    try:
        return int(local_part(parameter).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):  # of sparse or not yet initialized parameters
        return id(parameter)


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """One int64 for each tensor, on its device: the sum of its bits read as integers. Equal tensors have equal ones.

    Sparse and quantized tensors and those that are not initialized have 0.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    sums = [_sum_of_bits(tensor) for tensor in tensors]
    return torch.stack([value.to(sums[0].device) for value in sums])


def _sum_of_bits(tensor: Tensor) -> Tensor:
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    part = local_part(tensor).contiguous()
    if part.is_complex():
        part = torch.view_as_real(part)
    return part.view(INTEGERS[part.element_size()]).sum()


def read(values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[float]:
    """Reduce small values (N,) over all processes on the device, and copy them to the host, once."""
    values = values.to(torch.float32)
    if has_processes():
        dist.all_reduce(values, op)
    found: list[float] = values.tolist()
    return found


def matching_pairs(
    pl_module: nn.Module, teachers: Collection[str], students: Collection[str], others: Collection[str] = ()
) -> list[tuple[str, str]]:
    """Names of the largest modules of teachers, each with its student: of the same structure, and a similar name.

    A student may have further parameters. A teacher of which only parts have a student is another architecture.

    Args:
        pl_module: Module that contains both sides.
        teachers: Names of the parameters of teachers. A teacher module contains no others, and a student module none.
        students: Names of parameters that are trained. Teachers whose student has none of them are skipped.
        others: Names of further parameters that no student contains.
    """
    teachers, excluded = set(teachers), {*teachers, *others}
    parts: dict[str, dict[str, str]] = {name: {} for name, _ in pl_module.named_modules() if name}
    structures: dict[str, set[tuple[str, torch.Size]]] = {name: set() for name in parts}
    for name, parameter in pl_module.named_parameters():
        if not is_lazy(parameter):
            for index in (index for index, letter in enumerate(name) if letter == "."):
                below = without_compile(name[index + 1 :])
                parts[name[:index]][below] = name
                structures[name[:index]].add((below, parameter.shape))
    largest: list[str] = []
    for module, own in parts.items():  # parents come before their children
        is_below = any(module.startswith(f"{other}.") for other in largest)
        if own and not is_below and teachers.issuperset(own.values()):
            largest.append(module)
    possible = [module for module, own in parts.items() if own and excluded.isdisjoint(own.values())]
    pairs = []
    for teacher in largest:
        alike = [one for one in possible if structures[one] >= structures[teacher] and _are_alike(one, teacher)]
        if alike:
            likeness = {one: difflib.SequenceMatcher(None, one, teacher).ratio() for one in alike}
            student = max(alike, key=lambda one: (structures[one] == structures[teacher], likeness[one]))
            if any(parts[student][name] in students for name in parts[teacher]):
                pairs.append((student, teacher))
    return pairs


def _are_alike(student: str, teacher: str) -> bool:
    """Whether two names differ in one word, or one has a word more: student_head and teacher_head, net and ema_net."""
    ours, theirs = (
        [word for word in re.split(r"[._]", without_compile(name)) if word != "module"] for name in (student, teacher)
    )
    if len(ours) == len(theirs):
        return bool(sum(a != b for a, b in zip(ours, theirs, strict=True)) == 1)
    short, long = sorted((ours, theirs), key=len)
    return any([*long[:index], *long[index + 1 :]] == short for index in range(len(long)))


def as_code(pairs: Pairs) -> str:
    """TeacherUpdateCallback for these pairs, as code."""
    written = ", ".join(f'("{student}", "{teacher}")' for student, teacher in pairs)
    return f"TeacherUpdateCallback({'' if tuple(pairs) == DEFAULT else f'pairs=({written},)'})"


def settings_for(pl_module: nn.Module, pairs: Pairs) -> str:
    """A sentence about the settings of probe and report for these pairs, if their default is another."""
    backbone = next((name for _, teacher in pairs if (name := _without_head(pl_module, teacher))), None)
    if backbone in (None, "teacher.backbone"):
        return ""
    return f' KNNProbeCallback and ReportCallback, if you use them, then need module="{backbone}".'


def _without_head(pl_module: nn.Module, teacher: str) -> str | None:
    """The part of a teacher in front of its head; None for a head."""
    part = None
    for name, module in [("", pl_module.get_submodule(teacher)), *pl_module.get_submodule(teacher).named_children()]:
        if isinstance(module, DINOProjectionHead):
            return part
        part = f"{teacher}.{name}".rstrip(".")
    return teacher
