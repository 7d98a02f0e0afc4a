"""One look at a training batch: what its loss was called with, and whether weights have moved."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from dino_head.callbacks._access import local_part
from dino_head.callbacks.teacher_update import TeacherUpdateCallback
from dino_head.functional._outputs import as_outputs
from dino_head.losses import DINOLoss
from dino_head.metrics import DINOStatistics, RankMe

WITHOUT_FLOAT64 = ("mps",)
MOST_COLUMNS = 512  # of logits, whose rank is taken
Pairs = Sequence[tuple[str, str]]
Weights = list[tuple[list[int], list[int]]]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Look:
    """A forward pre-hook of a DINOLoss that measures all its calls in a training batch.

    Before the call, as afterwards the center may have moved. What is sampled is sampled evenly: nothing is random.
    """

    def __init__(self, loss: DINOLoss, trainer: Trainer, pl_module: LightningModule, pairs: Pairs) -> None:
        # Before the batch, when all callbacks are done with the last one.
        self.scheduled = scheduled(trainer)
        self.weights = fingerprints(pl_module, pairs)
        self.statistics: DINOStatistics | None = None  # None: not called
        self.rank: RankMe | None = None
        measure = torch.compiler.disable(self._measure)  # a compiled loss is not to take it in
        self._hook = loss.register_forward_pre_hook(measure, with_kwargs=True)

    def end(self) -> None:
        """Listen no longer."""
        self._hook.remove()

    def gather(self) -> dict[str, Tensor]:
        """The sums of statistics and rank (`products`), of all processes, in main memory. All have to call it."""
        assert self.statistics is not None
        assert self.rank is not None
        self.statistics.sync()
        self.rank.sync()
        sums = {**self.statistics.sums(), "products": self.rank.products, "embeddings": self.rank.samples}
        return {name: value.cpu() for name, value in sums.items()}

    @torch.no_grad()
    def _measure(self, loss: DINOLoss, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = inspect.signature(loss.forward).bind(*arguments, **options)
        given.apply_defaults()
        named = given.arguments
        if "teacher_out" not in named or "student_out" not in named:  # a class of the user's own
            return
        teacher, student = (as_outputs(named[name]) for name in ("teacher_out", "student_out"))
        if teacher.rows.device.type in WITHOUT_FLOAT64:
            teacher, student = teacher.cpu(), student.cpu()
        teacher_temp = named.get("teacher_temp")
        if teacher_temp is None:
            teacher_temp = loss.temperature(named.get("epoch"))
        temperatures = {"teacher_temp": float(teacher_temp), "student_temp": float(loss.student_temp)}
        self.scheduled |= temperatures
        stride = 1 if teacher.prototypes is not None else -(-teacher.output_dim // MOST_COLUMNS)
        embeddings = teacher.rows[..., ::stride]
        if self.statistics is None or self.rank is None:
            self.statistics = DINOStatistics(teacher.output_dim).to(embeddings.device)
            self.rank = RankMe(embeddings.shape[-1]).to(embeddings.device)
        center = loss.center_for(teacher, teacher_temp).to(embeddings.device)
        self.statistics.update(teacher, student, center=center, **temperatures)
        if embeddings.shape[-1] == len(self.rank.products):  # a second call may be of another kind
            self.rank.update(embeddings if embeddings.isfinite().all() else embeddings[:0])


def scheduled(trainer: Trainer) -> dict[str, float]:
    """What is often scheduled: the largest learning rate and weight decay, and the teacher's last momentum."""
    values: dict[str, float] = {}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for name, key in (("learning_rate", "lr"), ("weight_decay", "weight_decay")):
        of_groups = [float(group[key]) for group in groups if key in group]
        values |= {name: max(of_groups)} if of_groups else {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TeacherUpdateCallback) and callback.last_momentum is not None:
            values["teacher_momentum"] = callback.last_momentum
    return values


def known_pairs(trainer: Trainer, pl_module: LightningModule) -> Pairs:
    """Student and teacher: those of TeacherUpdateCallback, else the submodules of these names, else none."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, TeacherUpdateCallback)]  # type: ignore[attr-defined]
    names = [pair for callback in callbacks for pair in callback.pairs] or [("student", "teacher")]
    modules = dict(pl_module.named_modules())
    return [(student, teacher) for student, teacher in names if student in modules and teacher in modules]


def fingerprints(pl_module: LightningModule, pairs: Pairs) -> Weights:
    """Sums over the bits of each parameter, of the students and their teachers."""
    return [
        (_bits(pl_module.get_submodule(student)), _bits(pl_module.get_submodule(teacher))) for student, teacher in pairs
    ]


def _bits(module: nn.Module) -> list[int]:
    parts = [local_part(parameter).contiguous() for parameter in module.parameters()]
    return [int(part.view(BITS[part.element_size()]).sum()) for part in parts]
