"""Checks that all parts of the teacher that the loss uses are updated, by this library or other code."""

import inspect
from collections.abc import Callable
from functools import partial
from itertools import compress, islice
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
    address_of,
    as_code,
    find_submodule,
    fingerprint,
    local_part,
    matching_pairs,
    read,
    settings_for,
    without_compile,
)
from dino_head.callbacks._checks.losses import losses_of, outputs_of_side
from dino_head.callbacks._checks.own_code import may_write
from dino_head.losses import CenteredLoss

Sources = dict[str, tuple[set[str], set[str]]]

STEPS = 3  # optimizer steps after the first one that changed the student
LOOKS = 16  # it compares at each of the first 16 batches, later at every 16th
LATE = 200  # batches after which the user's own code should have updated the teacher
TRIES = 3  # further optimizer steps in which a loss may be called
SLOWEST = 1e-4  # 1 - momentum of a slow average


class TeacherCheck:
    """Compares all weights with those at the first batch, until three optimizer steps after the student first changed.

    Parameters that are then unchanged, not trained and in no pair are followed through one training step (`Flow`).
    Those that feed only the teacher's outputs of a loss, although their counterparts in the student have changed, are
    reported. Without such parameters, no step is followed. If code of a module or a callback may update the teacher
    every k steps (`may_write`), it has more time for a first update.

    All processes decide alike, as everything that they observe is reduced over them.

    Attributes:
        outcome: Names of the teacher's parts outside the pairs that are left behind, "none" or "not checked".
        has_warned: Whether it has warned that the teacher is never updated.
        wait: Number of optimizer steps from the first change of the student to the decision.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, pairs: Pairs) -> None:
        self.pl_module, self.pairs = pl_module, pairs
        self.outcome, self.has_warned, self.wait = "not checked", False, STEPS
        self._losses = losses_of(pl_module)
        self._is_done = not self._losses
        self._steps = 0  # that changed a trained parameter
        self._batches = 0
        self._global_step = -1
        # For each loss, the names of the parameters that feed the teacher's outputs, and those that feed the student's.
        self._sources: Sources = {name: (set(), set()) for name in self._losses}
        self._is_followed = False
        self._parameters: dict[str, nn.Parameter] = {}
        self._restore: Callable[[], None] | None = None

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
        if not self._parameters:
            self._begin(trainer)
        names = list(self._parameters)
        self._parameters = dict(self.pl_module.named_parameters())
        if list(self._parameters) != names:  # modules were added or removed
            self._is_done = True
            return
        just_now, changed = self._observe()
        self._steps += bool(just_now & self._trained)
        suspects = set(names) - self._trained - self._in_pairs - changed
        if self._steps >= self.wait and not suspects:
            self._is_done, self.outcome = True, "none"
        elif self._steps > self.wait and self._found_teachers() and not self._is_early(changed, is_last):
            self._is_done, self.outcome = True, "none"
            of_any = self._teachers()
            for teachers, students in self._sources.values():
                self._judge(suspects, changed, teachers - students, students, of_any)

    def _begin(self, trainer: Trainer) -> None:
        """Note the weights at the first batch, when all hooks that may set them have been called."""
        self._parameters = dict(self.pl_module.named_parameters())
        self._start = self._latest = fingerprint(list(self._parameters.values()))
        self._ids = {name: id(parameter) for name, parameter in self._parameters.items()}
        self._has_own_code = may_write([self.pl_module, *trainer.callbacks])  # type: ignore[attr-defined]
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        optimized = {id(parameter) for group in groups for parameter in group["params"]}
        in_pairs = {
            id(parameter)
            for _, teacher in self.pairs
            for parameter in find_submodule(self.pl_module, teacher, PAIRS).parameters()
        }
        everything = self._parameters.items()
        self._in_pairs = {name for name, parameter in everything if id(parameter) in in_pairs}
        self._trained = {
            name
            for name, parameter in everything
            if parameter.requires_grad and (not optimized or id(parameter) in optimized)
        }

    def _observe(self) -> tuple[set[str], set[str]]:
        """Names of the parameters that changed since the last look, and since the start; replaced ones changed."""
        now = fingerprint(list(self._parameters.values()))
        known = [[id(parameter) != self._ids[name] for name, parameter in self._parameters.items()]]
        if self._is_followed:
            known += [[name in side for name in self._parameters] for sides in self._sources.values() for side in sides]
        flags = torch.cat([now != self._latest, now != self._start, torch.tensor(known, device=now.device).flatten()])
        self._latest = now
        values = iter(read(flags, dist.ReduceOp.MAX))
        just_now, changed, replaced, *sources = (
            set(compress(self._parameters, islice(values, len(self._parameters)))) for _ in range(2 + len(known))
        )
        if self._is_followed:
            self._sources = dict(zip(self._losses, zip(sources[::2], sources[1::2], strict=True), strict=True))
            self._is_followed = False
        return just_now, changed | replaced

    def _teachers(self) -> set[str]:
        """Names of the parameters that feed only the teacher's outputs, of any loss."""
        return {name for teachers, students in self._sources.values() for name in teachers - students}

    def _found_teachers(self) -> bool:
        return bool(self._teachers())

    def _is_early(self, changed: set[str], is_last: bool) -> bool:
        """Whether the user's code, which has updated nothing yet, may do so every k steps."""
        may_follow = self._batches < LATE and not is_last and not self.pairs and not self._teachers() & changed
        return may_follow and self._has_own_code

    def follow_next(self) -> None:
        """Follow the parameters through the next training step, if necessary; the step computes the same values."""
        if self._is_done or self._steps < self.wait or not self._parameters or self._found_teachers():
            return
        if self._shares_memory() or self._steps > self.wait + TRIES:
            self._is_done = True
            return
        self.end()  # of a batch that was skipped
        self._is_followed = True
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

        def note(loss: CenteredLoss, given: tuple[Any, ...], options: dict[str, Any], *, name: str) -> None:
            named = inspect.signature(loss.forward).bind(*given, **options).arguments
            for sources, side in zip(self._sources[name], ("teacher_out", "student_out"), strict=True):
                if side in named:  # a subclass may have other arguments
                    sources |= flow.sources(*outputs_of_side(loss, named[side]).tensors)

        hooks = [
            loss.register_forward_pre_hook(partial(note, name=name), with_kwargs=True)
            for name, loss in self._losses.items()
        ]
        try:
            with torch.compiler.set_stance("force_eager"), flow:
                return training_step(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _judge(
        self, suspects: set[str], changed: set[str], teachers: set[str], students: set[str], of_any: set[str]
    ) -> None:
        """Compare a loss's teacher parameters that did not change with the student's that did."""
        stuck = suspects & teachers
        # The heads of two losses may be alike, so no part of a teacher counts as a student.
        candidates = matching_pairs(self.pl_module, suspects - students, changed & self._trained, of_any)
        pairs = [
            (student, teacher)
            for student, teacher in candidates
            if any(name.startswith(f"{teacher}.") for name in stuck) and self._should_have_changed(student, teacher)
        ]
        if not pairs:
            return
        ours, theirs = (", ".join(names) for names in zip(*pairs, strict=True))
        if teachers & (self._in_pairs | changed):
            self.outcome = theirs
            raise MisconfigurationException(
                f"the teacher is only partly updated: the loss uses {theirs}, which did not change in the {self.wait} "
                f"optimizer steps after {ours} first changed and {'is' if len(pairs) == 1 else 'are'} in no pair. Name "
                f"all parts: {as_code([*self.pairs, *pairs])}.{settings_for(self.pl_module, [*self.pairs, *pairs])}"
            )
        covered = {name for name in stuck for _, teacher in pairs if name.startswith(f"{teacher}.")}
        if covered == stuck:  # otherwise the teacher is another architecture
            self.outcome, self.has_warned = theirs, True
            rank_zero_warn(
                f"teacher does not follow: {theirs} did not change in the {self.wait} optimizer steps after {ours} "
                f"first changed. Add {as_code(pairs)} to the Trainer's callbacks, for a fixed teacher with "
                f"base_momentum=1.{settings_for(self.pl_module, pairs)} (If your own code updates it less often, "
                "ignore this.)"
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
            if value.is_floating_point()
        ]
        return bool(changes) and any(read(torch.stack(changes), dist.ReduceOp.MAX))

    def _shares_memory(self) -> bool:
        """Whether parameters are shards, or views of a flat parameter, and cannot be told apart."""
        distinct = {id(parameter): parameter for parameter in self._parameters.values()}.values()
        addresses = {address_of(parameter) for parameter in distinct}
        return len(addresses) < len(distinct) or any(isinstance(parameter, DTensor) for parameter in distinct)
