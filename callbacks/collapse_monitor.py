"""Watching what the loss is made of while DINO trains, and saying so when it collapses."""

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dino_head._arguments import check_integer
from dino_head.callbacks._look import Look, fingerprints, scheduled
from dino_head.diagnosis import HEALTHY, diagnose
from dino_head.losses import DINOLoss
from dino_head.metrics import statistics_of

MOST_LOOKS = 1000  # that are remembered


class Seen(NamedTuple):
    """What is kept of a look."""

    sums: dict[str, Tensor]  # of its DINOStatistics
    loss: float
    rankme: float
    weights: list[tuple[list[int], list[int]]]


class CollapseMonitorCallback(Callback):
    """Logs what the loss consists of and the rank of the embeddings, and says in words when training collapses.

        Trainer(callbacks=[CollapseMonitorCallback(), ...])

    Every so many batches it looks at what the DINOLoss of the LightningModule is called with, through a hook that is
    there for that batch alone, and logs `dino/...`: the values of `DINOStatistics`, and as `dino/rankme` the effective
    rank (`RankMe`) of the teacher's embeddings in that batch (z of FactoredLogits; of logits, at most 512 columns
    spread evenly). Both are taken over all processes, prototype usage over the last `patience` looks. Loggers get the
    values at once, the progress bar shows `dino/loss_per_lnK`, and ModelCheckpoint and EarlyStopping may monitor any
    (`dino/rankme` with mode="max" where there are no labels): they see those of the last look.

    From the averages of the last `patience` looks `diagnose` is asked what is wrong; each case is said once, as a
    warning, or as mere information where the loss only seems to be stuck.

    Training is bitwise the same with and without it. Between looks nothing is kept on the device.

    Args:
        every_n_steps: training batches from one look to the next; the first batch is looked at.
        patience: looks that a diagnosis averages over.
        stop: whether a collapse ends the run, as EarlyStopping does.
        loss: name of the DINOLoss, as `named_modules()` lists it; None: the only one.

    Attributes:
        history: of each look its values, `epoch`, `step` (optimizer steps) and what is scheduled; of a long run 1,000
            looks at most, evenly spread, and the last one. In checkpoints, like `diagnoses`.
        diagnoses: what was said.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: no DINOLoss, or several and none named, or one that is not called in training.
    """

    def __init__(
        self, every_n_steps: int = 50, *, patience: int = 10, stop: bool = False, loss: str | None = None
    ) -> None:
        check_integer("every_n_steps", every_n_steps, 1)
        check_integer("patience", patience, 1)
        self.every_n_steps, self.patience, self.stop, self.loss = every_n_steps, patience, stop, loss
        self.history: list[dict[str, float]] = []
        self.diagnoses: list[str] = []
        self._batches = 0  # begun so far
        self._stride = 1  # of how many looks one is remembered
        self._is_due = False  # as the last look has seen nothing
        self._module: DINOLoss | None = None
        self._look: Look | None = None
        self._recent: deque[Seen] = deque(maxlen=patience)

    @property
    def receipt(self) -> str | None:
        """What was watched, what was seen last, and what was said; None before the first look."""
        if not self.history:
            return None
        last = self.history[-1]
        cases = ", ".join(text.split(":")[0] for text in self.diagnoses)
        return (
            f"watched {self._batches} batches, last with loss {last['loss']:.3f} = {last['loss_per_lnK']:.3f} ln K, of "
            f"which {last['kl']:.3f} KL, and RankMe {last['rankme']:.1f}; diagnosis: {cases or 'none'}"
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._batches, self._stride, self.history, self.diagnoses = 0, 1, [], []

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
        self._is_due = False
        self._recent.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the loss, if it is this batch's turn."""
        self._end_look()  # of a batch that was left out
        if (self._is_due or self._batches % self.every_n_steps == 0) and self._module is not None:
            self._look = Look(self._module)
        self._batches += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log what was seen, and say what it means."""
        look = self._end_look()
        if look is None:
            return
        self._is_due = not trainer.strategy.reduce_boolean_decision(look.statistics is not None)
        if self._is_due:  # a batch that some process has left out: the next one will do
            return
        sums, rankme = look.gather()
        values = {name: value.item() for name, value in statistics_of(sums).items()}
        self._recent.append(Seen(sums, values["loss"], rankme, fingerprints(trainer, pl_module)))
        averages = self._averages(trainer)
        values |= {name: averages[name] for name in ("prototypes_used", "prototypes_effective")}
        values["rankme"] = rankme
        del values["rows"], values["output_dim"]
        self._log(trainer, pl_module, {f"dino/{name}": value for name, value in values.items()})
        moment = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        self._remember({**moment, **values, **scheduled(trainer, look)})
        if len(self._recent) == self.patience or not math.isfinite(values["loss"]):
            self._say(trainer, diagnose(averages))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to watch what never happens."""
        if self._is_due and not self.history:
            raise MisconfigurationException(
                "CollapseMonitorCallback listens to the DINOLoss of the module, and that was not called in an epoch: "
                "call it as loss(teacher, student)"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no longer, and say what was seen."""
        self._end_look()
        rank_zero_info(self.receipt)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no longer."""
        self._end_look()

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said. In a run that goes on, averages begin anew."""
        seen = {"batches": self._batches, "history": self.history, "stride": self._stride}
        return {**seen, "diagnoses": self.diagnoses, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._batches, self._stride = state_dict["batches"], state_dict["stride"]
        self.history, self.diagnoses = state_dict["history"], state_dict["diagnoses"]

    def _end_look(self) -> Look | None:
        look, self._look = self._look, None
        if look is not None:
            look.end()
        return look

    def _remember(self, values: dict[str, float]) -> None:
        earlier = (self._batches - 1) // self.every_n_steps  # looks; the last one stays until the next comes
        self.history = self.history[: -(-earlier // self._stride)]
        if len(self.history) >= MOST_LOOKS:
            self.history, self._stride = self.history[::2], 2 * self._stride
        self.history.append(values)

    def _averages(self, trainer: Trainer) -> dict[str, float]:
        """Of the last looks, as `diagnose` takes them."""
        total = {
            name: torch.stack([seen.sums[name] for seen in self._recent]).sum(dim=0) for name in self._recent[0].sums
        }
        averages = {name: value.item() for name, value in statistics_of(total).items()}
        averages["rankme"] = sum(seen.rankme for seen in self._recent) / len(self._recent)
        losses = [seen.loss for seen in self._recent]
        half = len(losses) // 2
        if half:
            averages["loss_change"] = sum(losses[-half:]) / sum(losses[:half]) - 1
        stands = any(
            students != students_now and teachers == teachers_now
            for (students, teachers), (students_now, teachers_now) in zip(
                self._recent[0].weights, self._recent[-1].weights, strict=True
            )
        )
        averages["teacher_follows"] = float(not trainer.strategy.reduce_boolean_decision(stands, all=False))
        return averages

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        # Directly, as Lightning would send them to the loggers with its next line, and with each one after it.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        in_bar = "dino/loss_per_lnK"
        for name, value in values.items():
            pl_module.log(name, value, logger=False, on_step=True, on_epoch=False, prog_bar=name == in_bar)

    def _say(self, trainer: Trainer, text: str | None) -> None:
        if text is None:
            return
        is_collapse = not text.startswith(HEALTHY)
        if text.split(":")[0] not in {said.split(":")[0] for said in self.diagnoses}:
            self.diagnoses.append(text)
            (rank_zero_warn if is_collapse else rank_zero_info)(
                f"epoch {trainer.current_epoch}, step {trainer.global_step}: {text}"
            )
        if self.stop and is_collapse:
            trainer.should_stop = True
