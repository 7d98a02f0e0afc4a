"""Checks that all parts of the teacher that the loss uses are updated, by this library or other code."""

import inspect
from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor

from dino_head.callbacks._checks.flow import Flow
from dino_head.callbacks._checks.layout import (
    PAIRS,
    Pairs,
    as_arguments,
    find_submodule,
    fingerprint,
    local_part,
    matching_pairs,
    read,
    without_compile,
)
from dino_head.callbacks._checks.own_code import may_write
from dino_head.functional._outputs import as_outputs
from dino_head.losses import DINOLoss

STEPS = 3  # optimizer steps after the first one that changed the student
LOOKS = 16  # it compares at each of the first 16 batches, later at every 16th
LATE = 200  # batches after which the user's own code should have updated the teacher
TRIES = 3  # further optimizer steps in which a loss may be called
SLOWEST = 1e-4  # 1 - momentum of a slow average


class TeacherCheck:
    """Compares all weights with those at the start, until three optimizer steps after the student first changed.

    Parameters that are then unchanged, frozen and in no pair are followed through one training step (`Flow`). Those
    that feed only the teacher's outputs of a loss, although their counterparts in the student have changed, are
    reported. Without such parameters, no step is followed. If code of a module or a callback may update the teacher
    every k steps (`may_write`), it has more time for a first update.

    Attributes:
        outcome: Names of the teacher's parts outside the pairs that are left behind, "none" or "not checked".
        has_warned: Whether it has warned that the teacher is never updated.
        wait: Number of optimizer steps from the first change of the student to the decision.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, pairs: Pairs) -> None:
        self.pl_module, self.pairs = pl_module, pairs
        self.outcome, self.has_warned, self.wait = "not checked", False, STEPS
        self._losses = [module for module in pl_module.modules() if isinstance(module, DINOLoss)]
        self._is_done = not self._losses
        self._steps = 0  # that changed a trained parameter
        self._batches = 0
        self._global_step = trainer.global_step
        self._teachers: set[str] = set()  # parameters that feed only the teacher's outputs of a loss
        self._students: set[str] = set()  # parameters that feed the student's
        self._parameters = dict(pl_module.named_parameters())
        self._start = self._latest = fingerprint(list(self._parameters.values()))
        self._identities = self._now_identities()
        self._restore: Callable[[], None] | None = None
        self._has_own_code = may_write([pl_module, *trainer.callbacks])  # type: ignore[attr-defined]
        in_pairs = {
            id(parameter)
            for _, teacher in pairs
            for parameter in find_submodule(pl_module, teacher, PAIRS).parameters()
        }
        self._frozen = {
            name
            for name, parameter in self._parameters.items()
            if not parameter.requires_grad and id(parameter) not in in_pairs
        }

    def look(self, trainer: Trainer, *, is_last: bool = False) -> None:
        """Compare the weights after a batch; raise an error or warn after enough steps.

        Raises:
            MisconfigurationException: The teacher is only partly updated.
        """
        self._batches += 1
        has_stepped = trainer.global_step != self._global_step or trainer.global_step == 0  # 0: raw optimizers
        is_time = is_last or self._batches <= LOOKS or self._batches % LOOKS == 0
        if self._is_done or not has_stepped or not is_time:
            return
        self._global_step = trainer.global_step
        self._parameters = dict(self.pl_module.named_parameters())
        written = self._written()
        if self._parameters.keys() != self._identities.keys():  # modules were added or removed
            self._is_done = True
            return
        now = fingerprint(list(self._parameters.values()))
        values = read(torch.cat([now != self._latest, now != self._start]), dist.ReduceOp.MAX)
        self._latest = now
        count = len(self._parameters)
        just_now, changed = (set(compress(self._parameters, part)) for part in (values[:count], values[count:]))
        self._steps += any(self._parameters[name].requires_grad for name in just_now)
        suspects = self._frozen - changed - written
        if self._steps >= self.wait and not suspects:
            self._is_done, self.outcome = True, "none"
        elif self._steps > self.wait and self._teachers and not self._is_early(changed, is_last=is_last):
            self._is_done = True
            self._judge(suspects, changed)

    def _is_early(self, changed: set[str], *, is_last: bool) -> bool:
        """Whether the user's code, which has updated nothing yet, may do so every k steps."""
        may_follow = self._batches < LATE and not is_last and not self.pairs and not self._teachers & changed
        return may_follow and self._has_own_code

    def follow_next(self) -> None:
        """Follow the parameters through the next training step, if necessary; the step computes the same values."""
        if self._is_done or self._steps < self.wait or self._teachers:
            return
        if self._shares_memory() or self._steps > self.wait + TRIES:
            self._is_done = True
            return
        self.end()  # of a batch that was skipped
        training_step, own = self.pl_module.training_step, vars(self.pl_module).get("training_step")

        def restore() -> None:
            if own is None:
                del self.pl_module.training_step
            else:
                self.pl_module.training_step = own  # type: ignore[method-assign]

        def follow(*args: Any, **kwargs: Any) -> Any:
            self.end()
            return self._follow(training_step, args, kwargs)

        self._restore = restore
        self.pl_module.training_step = follow  # type: ignore[method-assign]

    def end(self) -> None:
        """Restore the module's own training step."""
        if self._restore is not None:
            self._restore()
            self._restore = None

    def _follow(self, training_step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        flow = Flow(self._parameters)
        teachers: set[str] = set()
        students: set[str] = set()

        def note(loss: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
            named = inspect.signature(loss.forward).bind(*given, **options).arguments
            for names, side in ((teachers, "teacher_out"), (students, "student_out")):
                if side in named:  # a subclass may have other arguments
                    names |= flow.sources(*as_outputs(named[side]).tensors)

        hooks = [loss.register_forward_pre_hook(note, with_kwargs=True) for loss in self._losses]
        try:
            with torch.compiler.set_stance("force_eager"), flow:
                return training_step(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            self._teachers, self._students = teachers - students, students

    def _judge(self, suspects: set[str], changed: set[str]) -> None:
        """Compare the teacher's parameters that did not change with the student's that did."""
        stuck = suspects & self._teachers
        trained = {name for name in changed if self._parameters[name].requires_grad}
        candidates = matching_pairs(self.pl_module, suspects - self._students, trained, self._teachers)
        pairs = [
            (student, teacher)
            for student, teacher in candidates
            if any(name.startswith(f"{teacher}.") for name in stuck) and self._should_have_changed(student, teacher)
        ]
        students, teachers = (", ".join(names) for names in zip(*pairs, strict=True)) if pairs else ("", "")
        is_updated = bool(self.pairs or self._teachers & changed or self._teachers & self._written())
        covered = {name for name in stuck for _, teacher in pairs if name.startswith(f"{teacher}.")}
        self.outcome = teachers if pairs else "none"
        if is_updated and pairs:
            raise MisconfigurationException(
                f"the teacher is only partly updated: the loss uses {teachers}, which did not change in the "
                f"{self.wait} optimizer steps after {students} first changed, and "
                f"{'is' if len(pairs) == 1 else 'are'} in no pair. Name all parts: "
                f"{as_arguments(self.pl_module, [*self.pairs, *pairs])}"
            )
        if pairs and covered == stuck:  # otherwise the teacher is another architecture
            self.has_warned = True
            rank_zero_warn(
                f"teacher does not follow: {teachers} did not change in the {self.wait} optimizer steps after "
                f"{students} first changed. Add {as_arguments(self.pl_module, pairs)} to the Trainer's callbacks (for "
                "a fixed teacher, with base_momentum=1). If your own code updates it less often, ignore this warning."
            )

    def _should_have_changed(self, student: str, teacher: str) -> bool:
        """Whether even a slow average would have changed a parameter of the teacher, in float arithmetic."""
        students, teachers = (
            {without_compile(name): local_part(parameter) for name, parameter in side.named_parameters()}
            for side in (self.pl_module.get_submodule(student), self.pl_module.get_submodule(teacher))
        )
        changes = [
            ((students[name] - value).abs() * SLOWEST > value.abs() * torch.finfo(value.dtype).eps).any()
            for name, value in teachers.items()
        ]
        return any(read(torch.stack(changes), dist.ReduceOp.MAX))

    def _written(self) -> set[str]:
        """Frozen parameters that were written to, even with equal values, as by an average of equal networks."""
        now = self._now_identities()
        return {name for name in self._frozen if now.get(name) != self._identities[name]}

    def _now_identities(self) -> dict[str, tuple[int, ...]]:
        return {
            name: (id(parameter), parameter._version, local_part(parameter).data_ptr())
            for name, parameter in self._parameters.items()
        }

    def _shares_memory(self) -> bool:
        """Whether parameters are shards, or views of a flat parameter, and cannot be told apart."""
        distinct = {id(parameter): parameter for parameter in self._parameters.values()}.values()
        addresses = {local_part(parameter).untyped_storage()._cdata for parameter in distinct}
        return len(addresses) < len(distinct) or any(isinstance(parameter, DTensor) for parameter in distinct)
