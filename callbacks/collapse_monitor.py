"""A callback that logs the parts of the losses during training, and diagnoses a collapse."""

import inspect
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dino_head._arguments import check_integer
from dino_head.callbacks._checks import Checked
from dino_head.callbacks._checks.losses import losses_of, outputs_of_side
from dino_head.callbacks.teacher_update import TeacherUpdateCallback
from dino_head.diagnosis import case_of, diagnose, is_collapse
from dino_head.losses import CenteredLoss, DINOLoss, IBOTPatchLoss, has_processes
from dino_head.metrics import DINOStatistics, RankMe
from dino_head.metrics.rankme import effective_rank
from dino_head.metrics.statistics import statistics_of

MAX_HISTORY = 1000  # measurements
MAX_COLUMNS = 512  # of logits, for their rank
WITHOUT_FLOAT64 = ("mps",)
KINDS: dict[str, type[CenteredLoss]] = {"dino": DINOLoss, "ibot": IBOTPatchLoss}  # by the prefix of logged values
ROWS = {"dino": "images", "ibot": "patches"}
TERMS = ("loss", "dino", "ibot", "koleo")
IN_BAR = "dino/loss_normalized"


class CollapseMonitorCallback(Checked):
    """Logs the parts of each loss and the rank of the embeddings, and warns of a collapse with a remedy.

        Trainer(callbacks=[CollapseMonitorCallback(), ...])

    It measures the inputs of the module's DINOLoss through a hook that exists only during measured batches, and logs
    `dino/...`: the values of `DINOStatistics`, and `dino/rankme`, the effective rank (`RankMe`) of the teacher's
    embeddings in that batch (z of FactoredLogits; of logits, at most 512 columns spread evenly). Values cover all
    processes; prototype usage covers the last `patience` measurements. Loggers receive the values immediately, and the
    progress bar shows `dino/loss_normalized`. ModelCheckpoint and EarlyStopping can monitor the last measurement of
    any value (without labels, `dino/rankme` with mode="max").

    The same values of an IBOTPatchLoss are logged as `ibot/...`, over the masked patches of a batch. If a batch to
    be measured has none, the next batch is measured instead.

    Every diagnosis (`diagnose`) uses the averages of the last `patience` measurements of one loss, and the rank over
    all their embeddings. It is reported once, with epoch and step: a collapse as a warning, a case that may be harmless
    as information. A teacher that is never updated is reported earlier, as by every callback of this library.

    `dino/loss` is the loss of one measured batch (of at most 256 rows of FactoredLogits), while the `loss` that the
    example modules log is the mean over an epoch. `ibot/loss` is the mean over the masked patches of the batch, while
    IBOTPatchLoss averages over all views, and a view without a mask counts as 0.

    Training is bitwise the same with and without it. Between measurements, it uses no memory on the device and reads no
    value from it.

    Args:
        every_n_steps: Number of training batches from one measurement to the next, >= 1; the first batch is measured.
        patience: Number of measurements that a diagnosis averages over, >= 1.
        stop: Whether a collapse ends the run, as EarlyStopping does; diagnoses that may be harmless, such as dead
            prototypes, do not.
        loss: Name of the loss to measure, as in `named_modules()`, if there are several of its kind.

    Attributes:
        history: Values of each measurement, with `epoch`, `step` (optimizer steps) and scheduled values. Those of an
            IBOTPatchLoss begin with "ibot/". A long run keeps at most 1,000 measurements, evenly spread, and the last
            one. Saved in checkpoints.
        terms: Means over each epoch of the terms that the module logs as "loss", "dino", "ibot" and "koleo" with
            `self.log`, with `epoch` and `step`; empty if it logs fewer than two of them. Saved in checkpoints.
        diagnoses: Diagnoses that were reported. Saved in checkpoints.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: When training starts, if there is no loss to measure, or several of one kind and
            `loss` names none of them.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        patience: int = 10,
        stop: bool = False,
        loss: str | None = None,
    ) -> None:
        check_integer("every_n_steps", every_n_steps, 1)
        check_integer("patience", patience, 1)
        self.every_n_steps, self.patience, self.stop, self.loss = every_n_steps, patience, stop, loss
        self.history: list[dict[str, float]] = []
        self.terms: list[dict[str, float]] = []
        self.diagnoses: list[str] = []
        self._batches, self._measured = 0, 0  # batches so far, and those that were measured
        self._stride = 1  # number of measurements for each one in the history
        self._watched: list[_Watched] = []

    @property
    def receipt(self) -> str | None:
        """The number of measurements, the last values and the diagnoses; None before the first measurement."""
        if not self.history:
            return None
        last = []
        for prefix, name in (("", ""), ("ibot/", "patch ")):
            values = next((row for row in reversed(self.history) if f"{prefix}loss" in row), None)
            if values is not None:
                loss, share, kl, rank = (values[prefix + key] for key in ("loss", "loss_normalized", "kl", "rankme"))
                last.append(f"{name}loss {loss:.3f} = {share:.3f} ln K, of which {kl:.3f} KL, and RankMe {rank:.1f}")
        cases = ", ".join(map(case_of, self.diagnoses))
        return (
            f"looked at {self._measured} of {self._batches} batches, last with {', '.join(last)}; "
            f"diagnosis: {cases or ('none' if self.has_judged else 'too early')}"
        )

    @property
    def has_judged(self) -> bool:
        """Whether there were enough measurements for a diagnosis."""
        return self._measured >= self.patience

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._batches, self._measured, self._stride = 0, 0, 1
            self.history, self.terms, self.diagnoses = [], [], []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the losses."""
        super().on_train_start(trainer, pl_module)
        losses = losses_of(pl_module)
        self._watched = []
        for prefix, kind in KINDS.items():
            names = [name for name, loss in losses.items() if isinstance(loss, kind)]
            chosen = [self.loss] if self.loss in names else names
            self._watched += [_Watched(prefix, losses[name], self.patience) for name in chosen]
        is_found = self.loss is None or self.loss in losses
        if not self._watched or not is_found or len({one.prefix for one in self._watched}) < len(self._watched):
            raise MisconfigurationException(
                f"CollapseMonitorCallback measures one DINOLoss and one IBOTPatchLoss, got loss={self.loss!r}, and "
                f"{type(pl_module).__name__} has {', '.join(losses) or 'none'}: name one of them with loss=..., or for "
                "another kind of loss use dino_head.metrics.DINOStatistics in training_step"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add a hook to each loss, if this batch is to be measured."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        for watched in self._watched:
            watched.end_measurement()  # of a batch that was skipped
            if watched.is_due or self._batches % self.every_n_steps == 0:
                watched.measurement = Measurement(watched.loss, trainer)
        self._batches += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the values, and report a diagnosis."""
        row: dict[str, float] = {}
        for watched in self._watched:
            row |= self._end_of_batch(trainer, pl_module, watched)
        if row:
            self._append_to_history({**_moment(trainer), **row})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the terms of the loss, and warn if a loss was never called."""
        logged = trainer.callback_metrics
        terms = {name: float(logged[name]) for name in TERMS if name in logged}
        if len(terms) > 1:
            self.terms.append({**_moment(trainer), **terms})
        for watched in self._watched:
            if watched.is_due and not watched.recent:
                call = "loss(teacher_out, student_out)"
                if watched.prefix == "ibot":
                    call = "loss(teacher_out, student_out, masks) with a masked patch"
                rank_zero_warn(
                    f"CollapseMonitorCallback measured nothing in epoch {trainer.current_epoch}: the "
                    f"{KINDS[watched.prefix].__name__} of the module was not called as {call}"
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks, and print the receipt."""
        super().on_train_end(trainer, pl_module)
        self._end_measurements()
        self._watched = []
        if self.receipt:
            rank_zero_info(self.receipt)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        super().on_exception(trainer, pl_module, exception)
        self._end_measurements()

    def state_dict(self) -> dict[str, Any]:
        """History and diagnoses. In a resumed run, the averages start again."""
        counts = {"batches": self._batches, "looks": self._measured, "stride": self._stride}
        rows = {"history": self.history, "terms": self.terms}
        return {**counts, **rows, "diagnoses": self.diagnoses, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the history and the diagnoses of a resumed run."""
        self._batches, self._measured, self._stride = (state_dict[name] for name in ("batches", "looks", "stride"))
        self.history, self.diagnoses = state_dict["history"], state_dict["diagnoses"]
        self.terms = state_dict.get("terms", [])  # not in checkpoints of 0.2

    def _end_measurements(self) -> None:
        for watched in self._watched:
            watched.end_measurement()

    def _end_of_batch(self, trainer: Trainer, pl_module: LightningModule, watched: "_Watched") -> dict[str, float]:
        """Log the values of a loss and report a diagnosis; returns the values for the history."""
        measurement = watched.end_measurement()
        if measurement is None:
            return {}
        # If some process skipped the batch, or none has a masked patch, the next batch is measured.
        watched.is_due = not trainer.strategy.reduce_boolean_decision(measurement.statistics is not None)
        if not watched.is_due:
            sums = measurement.gather()
            watched.is_due = not _has_rows(sums)
        if watched.is_due:
            return {}
        watched.recent.append(sums)
        averages = {**_values(_total(watched.recent)), **self._changes(watched)}
        values = _values(sums)
        values |= {name: averages[name] for name in ("prototypes_used", "prototype_perplexity")}
        del values["rows"], values["output_dim"]
        self._log(trainer, pl_module, {f"{watched.prefix}/{name}": value for name, value in values.items()})
        if len(watched.recent) == self.patience or not math.isfinite(values["loss"]):
            self._report(trainer, diagnose(averages, rows=ROWS[watched.prefix]))
        own = {**values, **measurement.temperatures}
        before = "" if watched.prefix == "dino" else f"{watched.prefix}/"
        return {**measurement.scheduled, **{f"{before}{name}": value for name, value in own.items()}}

    def _append_to_history(self, values: dict[str, float]) -> None:
        self.history = self.history[: -(-self._measured // self._stride)]  # the last one stays until the next comes
        self._measured += 1
        if len(self.history) >= MAX_HISTORY:
            self.history, self._stride = self.history[::2], 2 * self._stride
        self.history.append(values)

    def _changes(self, watched: "_Watched") -> dict[str, float]:
        """Further inputs of `diagnose`: change of the loss, whether the teacher follows, and Sinkhorn's rows."""
        losses = [(sums["loss"] / sums["samples"]).item() for sums in watched.recent]
        half = len(losses) // 2
        changes = {}
        if half and sum(losses[:half]) > 0:
            changes["loss_change"] = sum(losses[-half:]) / sum(losses[:half]) - 1
        if self.teacher_check is not None and self.teacher_check.has_warned and watched is self._watched[0]:
            changes["teacher_follows"] = 0.0
        if watched.loss.centering == "sinkhorn":
            changes["sinkhorn_rows"] = sum(sums["batch_rows"].item() for sums in watched.recent) / len(watched.recent)
        return changes

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        # Lightning itself would log a value with its next log step, and again with each one after it.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        for name, value in values.items():
            pl_module.log(name, value, logger=False, on_step=True, on_epoch=False, prog_bar=name == IN_BAR)

    def _report(self, trainer: Trainer, diagnosis: str | None) -> None:
        if diagnosis is None:
            return
        case = case_of(diagnosis)
        if case not in map(case_of, self.diagnoses):
            text = f"{diagnosis} (seen in epoch {trainer.current_epoch}, step {trainer.global_step})"
            self.diagnoses.append(text)
            if not case.endswith("teacher does not follow"):  # TeacherCheck has reported it
                (rank_zero_warn if is_collapse(diagnosis) else rank_zero_info)(text)
        if self.stop and is_collapse(diagnosis):
            trainer.should_stop = True


class Measurement:
    """A forward pre-hook of a loss that measures all its calls in a training batch.

    It runs before the calls, because they may update the center. Samples are evenly spread, not random.
    """

    def __init__(self, loss: CenteredLoss, trainer: Trainer) -> None:
        self.scheduled = _scheduled(trainer)  # before the batch, when all callbacks have finished the previous one
        self.temperatures: dict[str, float] = {}
        self.statistics: DINOStatistics | None = None  # None until the loss is called
        self.rank: RankMe | None = None
        self.batch_rows = 0  # of the teacher in the last call, in this process
        measure = torch.compiler.disable(self._measure)  # excludes it from a compiled loss
        self._hook = loss.register_forward_pre_hook(measure, with_kwargs=True)

    def end(self) -> None:
        """Remove the hook."""
        self._hook.remove()

    def gather(self) -> dict[str, Tensor]:
        """Sums of statistics and rank (`products`) over all processes, on the CPU. All processes have to call it."""
        assert self.statistics is not None
        assert self.rank is not None
        sums = {**self.statistics.sums(), "products": self.rank.products, "embeddings": self.rank.samples}
        sums["batch_rows"] = torch.full_like(self.rank.samples, self.batch_rows)
        together = torch.cat([value.flatten() for value in sums.values()])
        if has_processes():
            dist.all_reduce(together)
        parts = together.cpu().split([value.numel() for value in sums.values()])
        return {name: part.view_as(sums[name]) for name, part in zip(sums, parts, strict=True)}

    @torch.no_grad()
    def _measure(self, loss: CenteredLoss, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = inspect.signature(loss.forward).bind(*arguments, **options)
        given.apply_defaults()
        named = given.arguments
        if "teacher_out" not in named or "student_out" not in named:  # a subclass with arguments of its own
            return
        teacher, student = (outputs_of_side(loss, named[name]) for name in ("teacher_out", "student_out"))
        self.batch_rows = teacher.views * teacher.samples
        if teacher.rows.device.type in WITHOUT_FLOAT64:
            teacher, student = teacher.cpu(), student.cpu()
        teacher_temp = named.get("teacher_temp")
        if teacher_temp is None:
            teacher_temp = loss.temperature(named.get("epoch"))
        self.temperatures = {"teacher_temp": float(teacher_temp), "student_temp": float(loss.student_temp)}
        stride = 1 if teacher.prototypes is not None else -(-teacher.output_dim // MAX_COLUMNS)
        embeddings = teacher.rows[..., ::stride]
        if self.statistics is None or self.rank is None:
            self.statistics = DINOStatistics(teacher.output_dim).to(embeddings.device)
            self.rank = RankMe(embeddings.shape[-1]).to(embeddings.device)
        center = loss.center_for(teacher, teacher_temp).to(embeddings.device)
        self.statistics.update(teacher, student, center=center, **self.temperatures)
        if embeddings.shape[-1] == len(self.rank.products):  # a second call may have embeddings of another width
            self.rank.update(embeddings)


@dataclass(eq=False)
class _Watched:
    """A loss that is measured."""

    prefix: str  # of its logged values
    loss: CenteredLoss
    patience: InitVar[int]
    is_due: bool = False  # whether the last batch should have been measured but was not
    measurement: Measurement | None = None  # of this batch
    recent: deque[dict[str, Tensor]] = field(init=False)  # sums of the last measurements

    def __post_init__(self, patience: int) -> None:
        self.recent = deque(maxlen=patience)

    def end_measurement(self) -> Measurement | None:
        """Remove the hook."""
        measurement, self.measurement = self.measurement, None
        if measurement is not None:
            measurement.end()
        return measurement


def _moment(trainer: Trainer) -> dict[str, float]:
    return {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}


def _scheduled(trainer: Trainer) -> dict[str, float]:
    """The largest learning rate and weight decay of all groups, and the last momentum of the teacher."""
    values: dict[str, float] = {}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for name, key in (("learning_rate", "lr"), ("weight_decay", "weight_decay")):
        of_groups = [float(group[key]) for group in groups if key in group]
        values |= {name: max(of_groups)} if of_groups else {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TeacherUpdateCallback) and callback.last_momentum is not None:
            values["teacher_momentum"] = callback.last_momentum
    return values


def _has_rows(sums: dict[str, Tensor]) -> bool:
    return bool(sums["rows"] > 0)


def _total(sums: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    first, *others = sums
    return {name: sum((other[name] for other in others), start=value) for name, value in first.items()}


def _values(sums: dict[str, Tensor]) -> dict[str, float]:
    """The values of the metrics, from the sums of one or several measurements."""
    values = {name: value.item() for name, value in statistics_of(sums).items()}
    return {**values, "rankme": effective_rank(sums["products"], sums["embeddings"]).item()}
