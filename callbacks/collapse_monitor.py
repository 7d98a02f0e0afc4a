"""Watching what the loss is made of while DINO trains, and saying so when it collapses."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dino_head._arguments import check_integer
from dino_head._statistics import effective_rank, statistics_of
from dino_head.callbacks._access import find_submodule
from dino_head.callbacks._look import Look, Pairs, Weights, known_pairs
from dino_head.callbacks._pairs import PAIRS
from dino_head.diagnosis import COLLAPSES, diagnose
from dino_head.losses import DINOLoss

MOST_LOOKS = 1000  # that are remembered


class CollapseMonitorCallback(Callback):
    """Logs what the loss consists of and the rank of the embeddings, and says in words when training collapses.

        Trainer(callbacks=[CollapseMonitorCallback(), ...])

    Every so many batches it looks at what the DINOLoss of the LightningModule is called with, through a hook that is
    there for that batch alone, and logs `dino/...`: the values of `DINOStatistics`, and as `dino/rankme` the effective
    rank (`RankMe`) of the teacher's embeddings in that batch (z of FactoredLogits; of logits, at most 512 columns
    spread evenly). Both are taken over all processes, prototype usage over the last `patience` looks. Loggers get the
    values at once, the progress bar shows `dino/loss_normalized`, and ModelCheckpoint and EarlyStopping may monitor any
    (`dino/rankme` with mode="max" where there are no labels): they see those of the last look.

    From the averages of the last `patience` looks (the rank being that of all their embeddings) `diagnose` is asked
    what is wrong; each case is said once, with the time at which it was seen: a collapse as a warning, what may be as
    it should as information. Whether the teacher follows is asked of the weights since training began.

    Training is bitwise the same with and without it. Between looks nothing is kept on the device.

    Args:
        every_n_steps: training batches from one look to the next; the first batch is looked at.
        patience: looks that a diagnosis averages over.
        stop: whether a collapse ends the run, as EarlyStopping does; dead prototypes, which may do no harm, do not.
        loss: name of the DINOLoss, as `named_modules()` lists it; None: the only one.
        pairs: names of the (student, teacher) submodules; None: those of TeacherUpdateCallback, else `student` and
            `teacher`.

    Attributes:
        history: of each look its values, `epoch`, `step` (optimizer steps) and what is scheduled; of a long run 1,000
            looks at most, evenly spread, and the last one. In checkpoints, like `diagnoses`.
        diagnoses: what was said.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: when training starts: no DINOLoss, or several and none named.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        *,
        patience: int = 10,
        stop: bool = False,
        loss: str | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        check_integer("every_n_steps", every_n_steps, 1)
        check_integer("patience", patience, 1)
        self.every_n_steps, self.patience, self.stop, self.loss = every_n_steps, patience, stop, loss
        self.pairs = pairs
        self.history: list[dict[str, float]] = []
        self.diagnoses: list[str] = []
        self._batches, self._looks = 0, 0  # so far
        self._stride = 1  # of how many looks one is remembered
        self._is_due = False  # as the last look has seen nothing
        self._module: DINOLoss | None = None
        self._pairs: Pairs = ()
        self._look: Look | None = None
        self._recent: deque[dict[str, Tensor]] = deque(maxlen=patience)  # sums of the last looks
        self._first_weights: Weights | None = None  # fingerprints of the first look since training began

    @property
    def receipt(self) -> str | None:
        """What was watched, what was seen last, and what was said; None before the first look."""
        if not self.history:
            return None
        last = self.history[-1]
        cases = ", ".join(text.split(":")[0] for text in self.diagnoses)
        return (
            f"looked at {self._looks} of {self._batches} batches, last with loss {last['loss']:.3f} = "
            f"{last['loss_normalized']:.3f} ln K, of which {last['kl']:.3f} KL, and RankMe {last['rankme']:.1f}; "
            f"diagnosis: {cases or ('none' if self.has_judged else 'too early')}"
        )

    @property
    def has_judged(self) -> bool:
        """Whether there were looks enough for a diagnosis."""
        return self._looks >= self.patience

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._batches, self._looks, self._stride, self.history, self.diagnoses = 0, 0, 1, [], []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the loss."""
        losses = {name: module for name, module in pl_module.named_modules() if isinstance(module, DINOLoss)}
        chosen = losses if self.loss is None else {name: losses[name] for name in losses if name == self.loss}
        if len(chosen) != 1:
            raise MisconfigurationException(
                f"CollapseMonitorCallback watches one DINOLoss, got loss={self.loss!r}, and {type(pl_module).__name__} "
                f"has {', '.join(losses) or 'none'}: name one of them with loss=..., or for another kind of loss use "
                "dino_head.metrics.DINOStatistics in training_step"
            )
        (self._module,) = chosen.values()
        self._pairs = known_pairs(trainer, pl_module) if self.pairs is None else self.pairs
        for name in (name for pair in self._pairs for name in pair):
            find_submodule(pl_module, name, PAIRS)
        if not self._pairs:
            rank_zero_warn(
                "CollapseMonitorCallback cannot see whether the teacher follows: there is neither a "
                "TeacherUpdateCallback nor a student and a teacher in the module; name yours with "
                f"CollapseMonitorCallback({PAIRS})"
            )
        self._is_due, self._first_weights = False, None
        self._recent.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the loss, if it is this batch's turn."""
        self._end_look()  # of a batch that was left out
        if (self._is_due or self._batches % self.every_n_steps == 0) and self._module is not None:
            self._look = Look(self._module, trainer, pl_module, self._pairs)
        self._batches += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log what was seen, and say what it means."""
        look = self._end_look()
        if look is None:
            return
        self._is_due = not trainer.strategy.reduce_boolean_decision(look.statistics is not None)
        if self._is_due:  # a batch that some process has left out: the next one will do
            return
        self._recent.append(look.gather())
        averages = {**_values(_total(self._recent)), **self._changes(trainer, look)}
        values = _values(self._recent[-1])
        values |= {name: averages[name] for name in ("prototypes_used", "prototype_perplexity")}
        del values["rows"], values["output_dim"]
        self._log(trainer, pl_module, {f"dino/{name}": value for name, value in values.items()})
        moment = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        self._remember({**moment, **values, **look.scheduled})
        if len(self._recent) == self.patience or not math.isfinite(values["loss"]):
            self._say(trainer, diagnose(averages))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there was nothing to see."""
        if self._is_due and not self.history:
            rank_zero_warn(
                f"CollapseMonitorCallback has seen nothing in epoch {trainer.current_epoch}: the DINOLoss of the "
                "module was not called, as loss(teacher_out, student_out)"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no longer, and say what was seen."""
        self._end_look()
        self._module = None
        if self.receipt:
            rank_zero_info(self.receipt)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no longer."""
        self._end_look()

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said. In a run that goes on, averages begin anew."""
        counts = {"batches": self._batches, "looks": self._looks, "stride": self._stride}
        return {**counts, "history": self.history, "diagnoses": self.diagnoses, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._batches, self._looks, self._stride = (state_dict[name] for name in ("batches", "looks", "stride"))
        self.history, self.diagnoses = state_dict["history"], state_dict["diagnoses"]

    def _end_look(self) -> Look | None:
        look, self._look = self._look, None
        if look is not None:
            look.end()
        return look

    def _remember(self, values: dict[str, float]) -> None:
        self.history = self.history[: -(-self._looks // self._stride)]  # the last one stays until the next comes
        self._looks += 1
        if len(self.history) >= MOST_LOOKS:
            self.history, self._stride = self.history[::2], 2 * self._stride
        self.history.append(values)

    def _changes(self, trainer: Trainer, look: Look) -> dict[str, float]:
        """What `diagnose` takes beside statistics: how the loss has changed, and whether the teacher follows."""
        losses = [(sums["loss"] / sums["samples"]).item() for sums in self._recent]
        half = len(losses) // 2
        changes = {}
        if half and sum(losses[:half]) > 0:
            changes["loss_change"] = sum(losses[-half:]) / sum(losses[:half]) - 1
        if self._first_weights is None:
            self._first_weights = look.weights
        stands = any(
            students != students_now and teachers == teachers_now
            for (students, teachers), (students_now, teachers_now) in zip(
                self._first_weights, look.weights, strict=True
            )
        )
        changes["teacher_follows"] = float(not trainer.strategy.reduce_boolean_decision(stands, all=False))
        return changes

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        # Directly, as Lightning would send them to the loggers with its next line, and with each one after it.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        in_bar = "dino/loss_normalized"
        for name, value in values.items():
            pl_module.log(name, value, logger=False, on_step=True, on_epoch=False, prog_bar=name == in_bar)

    def _say(self, trainer: Trainer, text: str | None) -> None:
        if text is None:
            return
        case = text.split(":")[0]
        if case not in {said.split(":")[0] for said in self.diagnoses}:
            said = f"{text} (seen in epoch {trainer.current_epoch}, step {trainer.global_step})"
            self.diagnoses.append(said)
            (rank_zero_warn if case in COLLAPSES else rank_zero_info)(said)
        if self.stop and case in COLLAPSES:
            trainer.should_stop = True


def _total(looks: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    first, *others = looks
    return {name: sum((look[name] for look in others), start=value) for name, value in first.items()}


def _values(sums: dict[str, Tensor]) -> dict[str, float]:
    """What the metrics compute from the sums of a look, or of several."""
    values = {name: value.item() for name, value in statistics_of(sums).items()}
    return {**values, "rankme": effective_rank(sums["products"], sums["embeddings"]).item()}
