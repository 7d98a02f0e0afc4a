"""A callback that logs the parts of the loss while DINO trains, and diagnoses a collapse."""

import inspect
import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dino_head._arguments import check_integer
from dino_head.callbacks._checks import Checked
from dino_head.callbacks.teacher_update import TeacherUpdateCallback
from dino_head.diagnosis import COLLAPSES, diagnose
from dino_head.functional._outputs import as_outputs
from dino_head.losses import DINOLoss, has_processes
from dino_head.metrics import DINOStatistics, RankMe
from dino_head.metrics.rankme import effective_rank
from dino_head.metrics.statistics import statistics_of

MAX_HISTORY = 1000  # measurements
MAX_COLUMNS = 512  # of logits, for their rank
WITHOUT_FLOAT64 = ("mps",)


class CollapseMonitorCallback(Checked):
    """Logs the parts of the loss and the rank of the embeddings, and warns of a collapse with a remedy.

        Trainer(callbacks=[CollapseMonitorCallback(), ...])

    It measures the inputs of the module's DINOLoss, through a hook that exists only during the measured batches, and
    logs `dino/...`: the values of `DINOStatistics`, and `dino/rankme`, the effective rank (`RankMe`) of the teacher's
    embeddings in that batch (z of FactoredLogits; of logits, at most 512 columns spread evenly). Values cover all
    processes; prototype usage covers the last `patience` measurements. Loggers receive the values immediately, and the
    progress bar shows `dino/loss_normalized`. ModelCheckpoint and EarlyStopping can monitor the last measurement of
    any value (without labels, `dino/rankme` with mode="max").

    Every diagnosis (`diagnose`) uses the averages of the last `patience` measurements and the rank of all their
    embeddings. It is reported once, with epoch and step: a collapse as a warning, a case that may be harmless as
    information. A teacher that is never updated is reported earlier, as by every callback of this library.

    `dino/loss` is the loss of one measured batch (of at most 256 rows of FactoredLogits), while the `loss` that the
    example module logs is the mean over an epoch.

    Training is bitwise the same with and without it. Between measurements, it uses no memory on the device and reads no
    value from it.

    Args:
        every_n_steps: Number of training batches from one measurement to the next, >= 1; the first batch is measured.
        patience: Number of measurements that a diagnosis averages over, >= 1.
        stop: Whether a collapse ends the run, as EarlyStopping does; dead prototypes, which may be harmless, do not.
        loss: Name of the DINOLoss, as in `named_modules()`; None if there is only one.

    Attributes:
        history: Values of each measurement, with `epoch`, `step` (optimizer steps) and scheduled values. A long run
            keeps at most 1,000 measurements, evenly spread, and the last one. Saved in checkpoints.
        diagnoses: Diagnoses that were reported. Saved in checkpoints.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: When training starts, if there is no DINOLoss, or several and `loss` is None.
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
        self.diagnoses: list[str] = []
        self._batches, self._measured = 0, 0  # batches so far, and those that were measured
        self._stride = 1  # number of measurements for each one in the history
        self._is_due = False  # whether the last batch should have been measured but did not call the loss
        self._module: DINOLoss | None = None
        self._measurement: Measurement | None = None  # of this batch
        self._recent: deque[dict[str, Tensor]] = deque(maxlen=patience)  # sums of the last measurements

    @property
    def receipt(self) -> str | None:
        """The number of measurements, the last values and the diagnoses; None before the first measurement."""
        if not self.history:
            return None
        last = self.history[-1]
        cases = ", ".join(_case(text) for text in self.diagnoses)
        return (
            f"looked at {self._measured} of {self._batches} batches, last with loss {last['loss']:.3f} = "
            f"{last['loss_normalized']:.3f} ln K, of which {last['kl']:.3f} KL, and RankMe {last['rankme']:.1f}; "
            f"diagnosis: {cases or ('none' if self.has_judged else 'too early')}"
        )

    @property
    def has_judged(self) -> bool:
        """Whether there were enough measurements for a diagnosis."""
        return self._measured >= self.patience

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._batches, self._measured, self._stride, self.history, self.diagnoses = 0, 0, 1, [], []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the loss."""
        super().on_train_start(trainer, pl_module)
        losses = {name: module for name, module in pl_module.named_modules() if isinstance(module, DINOLoss)}
        chosen = losses if self.loss is None else {name: losses[name] for name in losses if name == self.loss}
        if len(chosen) != 1:
            raise MisconfigurationException(
                f"CollapseMonitorCallback measures one DINOLoss, got loss={self.loss!r}, and "
                f"{type(pl_module).__name__} has {', '.join(losses) or 'none'}: name one of them with loss=..., or for "
                "another kind of loss use dino_head.metrics.DINOStatistics in training_step"
            )
        (self._module,) = chosen.values()
        self._is_due = False
        self._recent.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the hook to the loss, if this batch is to be measured."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._end_measurement()  # of a batch that was skipped
        if (self._is_due or self._batches % self.every_n_steps == 0) and self._module is not None:
            self._measurement = Measurement(self._module, trainer)
        self._batches += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the values, and report a diagnosis."""
        measurement = self._end_measurement()
        if measurement is None:
            return
        self._is_due = not trainer.strategy.reduce_boolean_decision(measurement.statistics is not None)
        if self._is_due:  # some process skipped the batch: measure the next one
            return
        self._recent.append(measurement.gather())
        averages = {**_values(_total(self._recent)), **self._changes()}
        values = _values(self._recent[-1])
        values |= {name: averages[name] for name in ("prototypes_used", "prototype_perplexity")}
        del values["rows"], values["output_dim"]
        self._log(trainer, pl_module, {f"dino/{name}": value for name, value in values.items()})
        moment = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        self._append_to_history({**moment, **values, **measurement.scheduled})
        if len(self._recent) == self.patience or not math.isfinite(values["loss"]):
            self._report(trainer, diagnose(averages))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the loss was never called."""
        if self._is_due and not self.history:
            rank_zero_warn(
                f"CollapseMonitorCallback measured nothing in epoch {trainer.current_epoch}: the DINOLoss of the "
                "module was not called as loss(teacher_out, student_out)"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hook, and print the receipt."""
        super().on_train_end(trainer, pl_module)
        self._end_measurement()
        self._module = None
        if self.receipt:
            rank_zero_info(self.receipt)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook."""
        super().on_exception(trainer, pl_module, exception)
        self._end_measurement()

    def state_dict(self) -> dict[str, Any]:
        """History and diagnoses. In a resumed run, the averages start again."""
        counts = {"batches": self._batches, "looks": self._measured, "stride": self._stride}
        return {**counts, "history": self.history, "diagnoses": self.diagnoses, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the history and the diagnoses of a resumed run."""
        self._batches, self._measured, self._stride = (state_dict[name] for name in ("batches", "looks", "stride"))
        self.history, self.diagnoses = state_dict["history"], state_dict["diagnoses"]

    def _end_measurement(self) -> "Measurement | None":
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            measurement.end()
        return measurement

    def _append_to_history(self, values: dict[str, float]) -> None:
        self.history = self.history[: -(-self._measured // self._stride)]  # the last one stays until the next comes
        self._measured += 1
        if len(self.history) >= MAX_HISTORY:
            self.history, self._stride = self.history[::2], 2 * self._stride
        self.history.append(values)

    def _changes(self) -> dict[str, float]:
        """Further inputs of `diagnose`: the change of the loss, and whether the teacher follows."""
        losses = [(sums["loss"] / sums["samples"]).item() for sums in self._recent]
        half = len(losses) // 2
        changes = {}
        if half and sum(losses[:half]) > 0:
            changes["loss_change"] = sum(losses[-half:]) / sum(losses[:half]) - 1
        if self.teacher_check is not None and self.teacher_check.has_warned:
            changes["teacher_follows"] = 0.0
        return changes

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        # Lightning itself would log a value with its next log step, and again with each one after it.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        in_bar = "dino/loss_normalized"
        for name, value in values.items():
            pl_module.log(name, value, logger=False, on_step=True, on_epoch=False, prog_bar=name == in_bar)

    def _report(self, trainer: Trainer, diagnosis: str | None) -> None:
        if diagnosis is None:
            return
        case = _case(diagnosis)
        if case not in map(_case, self.diagnoses):
            text = f"{diagnosis} (seen in epoch {trainer.current_epoch}, step {trainer.global_step})"
            self.diagnoses.append(text)
            if case != "teacher does not follow":  # TeacherCheck has reported it
                (rank_zero_warn if case in COLLAPSES else rank_zero_info)(text)
        if self.stop and case in COLLAPSES:
            trainer.should_stop = True


class Measurement:
    """A forward pre-hook of a DINOLoss that measures all its calls in a training batch.

    It runs before the calls, because they may update the center. Samples are evenly spread, not random.
    """

    def __init__(self, loss: DINOLoss, trainer: Trainer) -> None:
        self.scheduled = _scheduled(trainer)  # before the batch, when all callbacks have finished the previous one
        self.statistics: DINOStatistics | None = None  # None until the loss is called
        self.rank: RankMe | None = None
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
        together = torch.cat([value.flatten() for value in sums.values()])
        if has_processes():
            dist.all_reduce(together)
        parts = together.cpu().split([value.numel() for value in sums.values()])
        return {name: part.view_as(sums[name]) for name, part in zip(sums, parts, strict=True)}

    @torch.no_grad()
    def _measure(self, loss: DINOLoss, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = inspect.signature(loss.forward).bind(*arguments, **options)
        given.apply_defaults()
        named = given.arguments
        if "teacher_out" not in named or "student_out" not in named:  # a subclass with arguments of its own
            return
        teacher, student = (as_outputs(named[name]) for name in ("teacher_out", "student_out"))
        if teacher.rows.device.type in WITHOUT_FLOAT64:
            teacher, student = teacher.cpu(), student.cpu()
        teacher_temp = named.get("teacher_temp")
        if teacher_temp is None:
            teacher_temp = loss.temperature(named.get("epoch"))
        temperatures = {"teacher_temp": float(teacher_temp), "student_temp": float(loss.student_temp)}
        self.scheduled |= temperatures
        stride = 1 if teacher.prototypes is not None else -(-teacher.output_dim // MAX_COLUMNS)
        embeddings = teacher.rows[..., ::stride]
        if self.statistics is None or self.rank is None:
            self.statistics = DINOStatistics(teacher.output_dim).to(embeddings.device)
            self.rank = RankMe(embeddings.shape[-1]).to(embeddings.device)
        center = loss.center_for(teacher, teacher_temp).to(embeddings.device)
        self.statistics.update(teacher, student, center=center, **temperatures)
        if embeddings.shape[-1] == len(self.rank.products):  # a second call may have embeddings of another width
            self.rank.update(embeddings)


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


def _case(diagnosis: str) -> str:
    return diagnosis.split(":")[0]


def _total(sums: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    first, *others = sums
    return {name: sum((other[name] for other in others), start=value) for name, value in first.items()}


def _values(sums: dict[str, Tensor]) -> dict[str, float]:
    """The values of the metrics, from the sums of one or several measurements."""
    values = {name: value.item() for name, value in statistics_of(sums).items()}
    return {**values, "rankme": effective_rank(sums["products"], sums["embeddings"]).item()}
