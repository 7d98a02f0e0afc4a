"""The parameters of students and their teachers, side by side."""

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from dino_head.callbacks._access import find_submodule, local_part

PAIRS = 'pairs=(("student", "teacher"),)'


def find_parameters(pl_module: LightningModule, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of the teachers, once, with the student's of the same name in front of it; checked to fit."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for names in pairs:
        student, teacher = (
            {
                name.replace("_orig_mod.", ""): parameter  # torch.compile may have wrapped one side alone
                for name, parameter in find_submodule(pl_module, side, PAIRS).named_parameters()
            }
            for side in names
        )
        for name in student | teacher:
            _check_pair(f"{name!r} of {names}", student.get(name), teacher.get(name))
            student_of_teacher, _ = found.setdefault(id(teacher[name]), (student[name], teacher[name]))
            if student_of_teacher is not student[name]:
                raise MisconfigurationException(
                    f"{name!r} of {names} is in another pair as well, with another student: a teacher's parameter can "
                    "follow one alone"
                )
    return list(found.values())


def _check_pair(which: str, student: Tensor | None, teacher: Tensor | None) -> None:
    remedy = "make the teacher with copy.deepcopy(student)"
    if student is None or teacher is None or student.shape != teacher.shape:
        raise MisconfigurationException(
            f"student and teacher must have equal structure, but {which} is "
            f"{'missing' if student is None else tuple(student.shape)} in the student and "
            f"{'missing' if teacher is None else tuple(teacher.shape)} in the teacher: {remedy}"
        )
    if student is teacher:
        raise MisconfigurationException(f"{which} is one and the same parameter: {remedy}")
    if teacher.dtype in (torch.bfloat16, torch.float16):
        raise MisconfigurationException(
            f"{which} is {teacher.dtype} in the teacher, in which steps of 1 - momentum are rounded away and it would "
            "not move: keep the parameters in float32, with precision='bf16-mixed' or '16-mixed'"
        )
    if student.dtype != teacher.dtype:
        raise MisconfigurationException(
            f"{which} is {student.dtype} in the student and {teacher.dtype} in the teacher: {remedy}"
        )
    if teacher.requires_grad:
        raise MisconfigurationException(
            f"{which} requires a gradient in the teacher, which only follows: teacher.requires_grad_(False)"
        )
    is_sharded = isinstance(student, DTensor), isinstance(teacher, DTensor)
    if is_sharded[0] != is_sharded[1] or local_part(student).shape != local_part(teacher).shape:
        raise MisconfigurationException(
            f"{which} is sharded in another way in the teacher than in the student: apply fully_shard to both sides "
            "alike, and with reshard_after_forward=True, as a teacher that stays gathered would be averaged in vain"
        )
