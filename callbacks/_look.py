"""One look at a training batch: what its loss was called with, and whether weights have moved."""

import inspect
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from dino_head.callbacks._access import local_part
from dino_head.callbacks.teacher_update import TeacherUpdateCallback
from dino_head.functional import output_dim, stacked
from dino_head.losses import DINOLoss
from dino_head.metrics import DINOStatistics, RankMe

MOST_COLUMNS = 512  # of logits, whose rank is taken
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Look:
    """A forward pre-hook of a DINOLoss that measures all its calls in a training batch.

    Before the call, as afterwards the center may have moved. What is sampled is sampled evenly: nothing is random.
    """

    def __init__(self, loss: DINOLoss) -> None:
        self.temperatures: dict[str, float] = {}
        self.statistics: DINOStatistics | None = None  # None: not called
        self.rank: RankMe | None = None
        measure = torch.compiler.disable(self._measure)  # a compiled loss is not to take it in
        self._hook = loss.register_forward_pre_hook(measure, with_kwargs=True)

    def end(self) -> None:
        """Listen no longer."""
        self._hook.remove()

    def gather(self) -> tuple[dict[str, Tensor], float]:
        """The sums of the statistics, and the rank, of all processes, in main memory. All of them have to call it."""
        assert self.statistics is not None
        assert self.rank is not None
        self.statistics.sync()
        sums = {name: value.cpu() for name, value in self.statistics.sums().items()}
        return sums, self.rank.compute().item()

    @torch.no_grad()
    def _measure(self, loss: DINOLoss, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = inspect.signature(loss.forward).bind(*arguments, **options)
        given.apply_defaults()
        teacher, student = (stacked(given.arguments[name]) for name in ("teacher_out", "student_out"))
        teacher_temp = given.arguments["teacher_temp"]
        if teacher_temp is None:
            teacher_temp = loss.temperature(given.arguments["epoch"])
        self.temperatures = {"teacher_temp": teacher_temp, "student_temp": loss.student_temp}
        stride = -(-output_dim(teacher) // MOST_COLUMNS)
        embeddings = teacher[..., ::stride] if isinstance(teacher, Tensor) else teacher.z
        if self.statistics is None:
            self.statistics = DINOStatistics(output_dim(teacher)).to(embeddings.device)
            self.rank = RankMe(embeddings.shape[-1]).to(embeddings.device)
        center = loss.center_for(teacher, teacher_temp)
        self.statistics.update(teacher, student, center=center, **self.temperatures)
        assert self.rank is not None
        self.rank.update(embeddings if embeddings.isfinite().all() else embeddings[:0])


def scheduled(trainer: Trainer, look: Look) -> dict[str, float]:
    """What is often scheduled: temperatures, the largest learning rate and weight decay, the teacher's momentum."""
    values = dict(look.temperatures)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for name, key in (("learning_rate", "lr"), ("weight_decay", "weight_decay")):
        values |= {name: max(float(group[key]) for group in groups)} if all(key in group for group in groups) else {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TeacherUpdateCallback) and callback.last_momentum is not None:
            values["teacher_momentum"] = callback.last_momentum
    return values


def fingerprints(trainer: Trainer, pl_module: LightningModule) -> list[tuple[list[int], list[int]]]:
    """Sums over the bits of each parameter, of the students and their teachers.

    The pairs are those of TeacherUpdateCallback, else the submodules `student` and `teacher`, else none.
    """
    callbacks = [c for c in trainer.callbacks if isinstance(c, TeacherUpdateCallback)]  # type: ignore[attr-defined]
    names = [pair for callback in callbacks for pair in callback.pairs] or [("student", "teacher")]
    modules = dict(pl_module.named_modules())
    return [
        (_bits(modules[student]), _bits(modules[teacher]))
        for student, teacher in names
        if student in modules and teacher in modules
    ]


def _bits(module: nn.Module) -> list[int]:
    parts = [local_part(parameter).contiguous() for parameter in module.parameters()]
    return [int(part.view(BITS[part.element_size()]).sum()) for part in parts]
