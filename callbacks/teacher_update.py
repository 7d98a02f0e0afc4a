"""The teacher as an exponential moving average of the student."""

from collections.abc import Mapping, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_head._arguments import check_number
from dino_head.callbacks._find import find_submodule
from dino_head.callbacks._step import AfterOptimizerStep
from dino_head.schedules import cosine_schedule


class TeacherUpdateCallback(AfterOptimizerStep):
    """Moves the teacher towards the student, once after each optimizer step (arXiv:2104.14294, section 3.1).

        teacher <- m teacher + (1 - m) student,  m: cosine from base_momentum to final_momentum over the run

    Only parameters are averaged; the teacher keeps its own buffers (in train mode its batch norm follows its own
    batches, as in the authors' code). The count of updates is part of the checkpoint.

    Args:
        pairs: names of the (student, teacher) submodules of the LightningModule.
        base_momentum: m at the first update.
        final_momentum: m at the end of the run.

    Raises:
        ValueError: a momentum outside [0, 1], or no pair.
        MisconfigurationException: when training starts: a name that is not there, a pair whose parameters differ in
            name or shape, one object as both, a teacher in bf16 or fp16, a run without an end.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]] = (("student", "teacher"),),
        base_momentum: float = 0.996,
        final_momentum: float = 1.0,
    ) -> None:
        super().__init__()
        check_number("base_momentum", base_momentum, 0, 1)
        check_number("final_momentum", final_momentum, 0, 1)
        if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
            raise ValueError(f'pairs must hold (student, teacher) names like (("student", "teacher"),), got {pairs!r}')
        self.pairs = tuple((student, teacher) for student, teacher in pairs)
        self.base_momentum = base_momentum
        self.final_momentum = final_momentum
        self._students: list[Tensor] = []
        self._teachers: list[Tensor] = []
        self._total_steps = 0

    @property
    def state_key(self) -> str:
        """Made of the pairs, so that several of them get along in one Trainer."""
        return self._generate_state_key(pairs=self.pairs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the pairs and the length of the run."""
        total_steps = trainer.estimated_stepping_batches
        if not 0 < total_steps < float("inf"):  # negative for data without a length
            raise MisconfigurationException(
                "the teacher's momentum follows a cosine over the whole run, and the length of this run is not known: "
                "set max_epochs or max_steps in the Trainer, and for data without a length max_steps or "
                "limit_train_batches"
            )
        self._total_steps = int(total_steps)
        self._students, self._teachers = [], []
        for student_name, teacher_name in self.pairs:
            student = dict(find_submodule(pl_module, student_name).named_parameters())
            teacher = dict(find_submodule(pl_module, teacher_name).named_parameters())
            _check_pair(student_name, student, teacher_name, teacher)
            self._students.extend(student.values())
            self._teachers.extend(teacher.values())
        super().on_train_start(trainer, pl_module)

    @torch.no_grad()
    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average all pairs in one foreach lerp: equal weights stay bitwise equal."""
        update = self.steps_taken - 1
        momentum = cosine_schedule(update, self.base_momentum, self.final_momentum, self._total_steps)
        get_ema_multi_avg_fn(momentum)(self._teachers, self._students, update)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a teacher that would never move."""
        self.require_steps(trainer)


def _check_pair(
    student_name: str, student: Mapping[str, Tensor], teacher_name: str, teacher: Mapping[str, Tensor]
) -> None:
    for name in student.keys() | teacher.keys():
        ours, theirs = student.get(name), teacher.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise MisconfigurationException(
                f"{student_name!r} and {teacher_name!r} must have equal structure, but {name!r} is "
                f"{'missing' if ours is None else tuple(ours.shape)} in the student and "
                f"{'missing' if theirs is None else tuple(theirs.shape)} in the teacher: make the teacher with "
                "copy.deepcopy(student)"
            )
        if theirs.dtype in (torch.bfloat16, torch.float16):
            raise MisconfigurationException(
                f"{name!r} of {teacher_name!r} is {theirs.dtype}, in which steps of 1 - momentum are rounded away and "
                "the teacher would not move: keep the parameters in float32, with precision='bf16-mixed' or '16-mixed'"
            )
        if ours.dtype != theirs.dtype:
            raise MisconfigurationException(
                f"{name!r} is {ours.dtype} in {student_name!r} and {theirs.dtype} in {teacher_name!r}: make the "
                "teacher with copy.deepcopy(student)"
            )
        if ours is theirs:
            raise MisconfigurationException(
                f"{name!r} of {student_name!r} and {teacher_name!r} is one and the same parameter: make the teacher "
                "with copy.deepcopy(student)"
            )
