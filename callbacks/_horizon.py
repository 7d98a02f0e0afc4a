"""How many optimizer steps a run is made for: what schedules are stretched over."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dino_head._arguments import check_integer
from dino_head.callbacks._step import AfterOptimizerStep


class OverTheRun(AfterOptimizerStep):
    """Follows a schedule over all optimizer steps of a run, whose number is fixed at its start and saved.

    A run that is resumed with another length would silently follow another schedule from there on; that is an error
    unless `total_steps` asks for it.

    Args:
        total_steps: optimizer steps of the whole schedule; None: what the Trainer says of the run.
    """

    def __init__(self, total_steps: int | None) -> None:
        super().__init__()
        if total_steps is not None:
            check_integer("total_steps", total_steps, 1, " (optimizer steps of the whole schedule)")
            total_steps = int(total_steps)  # a number of NumPy's could not be loaded from a checkpoint
        self.total_steps = total_steps
        self._horizon: int | None = None  # the number in force

    @property
    def needs_horizon(self) -> bool:
        """Whether there is anything that depends on the length of the run."""
        return True

    def progress(self) -> str:
        """The steps taken, of how many."""
        if not self.needs_horizon or self._horizon is None:
            return f"{self.steps_taken} optimizer steps"
        if self.steps_taken > self._horizon:
            return f"{self.steps_taken} optimizer steps, of a schedule of {self._horizon}"
        return f"{self.steps_taken} of {self._horizon} optimizer steps"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self._horizon = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the horizon, or compare it with the one that the run began with."""
        if self.needs_horizon:
            horizon = self.total_steps or self._length(trainer)
            if self._horizon not in (None, horizon) and self.total_steps is None:
                raise MisconfigurationException(
                    f"{type(self).__name__} follows a schedule that was made for {self._horizon} optimizer steps, but "
                    f"this run is to have {horizon}: its remainder would be another one. Keep max_epochs, max_steps, "
                    "batch size, accumulation and number of processes as they were, or say what you want: "
                    f"total_steps={self._horizon} stays with the schedule that the run began with, "
                    f"total_steps={horizon} goes over to that of a run of this length (a LambdaLR of yours needs the "
                    "same choice)"
                )
            self._horizon = horizon
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop where the number of batches, or their accumulation, has changed since the run began."""
        if self.needs_horizon and self.total_steps is None and self._length(trainer) != self._horizon:
            raise MisconfigurationException(
                f"{type(self).__name__} follows a schedule that was made for {self._horizon} optimizer steps, but with "
                f"the batches and accumulation of epoch {trainer.current_epoch} it is to have {self._length(trainer)}: "
                "fix the length with max_steps in the Trainer, or with total_steps in the callback"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was kept."""
        super().on_train_end(trainer, pl_module)
        rank_zero_info(self.receipt)

    def state_dict(self) -> dict[str, Any]:
        """The count of steps and the horizon."""
        return {**super().state_dict(), "horizon": self._horizon}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up those of a run that goes on."""
        super().load_state_dict(state_dict)
        self._horizon = state_dict["horizon"]

    def _length(self, trainer: Trainer) -> int:
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):  # negative for data without a length
            raise MisconfigurationException(
                f"{type(self).__name__} follows a schedule over the whole run, and the length of this run is not "
                "known: set max_epochs or max_steps in the Trainer, for data without a length max_steps or "
                f"limit_train_batches, or {type(self).__name__}(..., total_steps=100_000)"
            )
        if not trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} follows a schedule over the whole run, and under manual optimization the "
                "Trainer does not know how many optimizer steps that will be: give total_steps, the number of batches "
                "in which an optimizer steps"
            )
        return int(steps)
