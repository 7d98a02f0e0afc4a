"""Accuracy of nearest neighbours while DINO trains."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dino_head._arguments import check_integer, check_number
from dino_head.callbacks._access import find_submodule
from dino_head.callbacks._features import Loaders, evaluation, extract, labelled_loaders
from dino_head.metrics import KNNAccuracy


class KNNProbeCallback(Callback):
    """Logs how well the k nearest neighbours of the teacher's features tell the labels, as `knn/top1`.

        Trainer(callbacks=[KNNProbeCallback(train, test), ModelCheckpoint(monitor="knn/top1", mode="max"), ...])

    The training samples vote on the test samples (`KNNAccuracy`); neither takes part in the training. Probed are the
    first, each `every_n_epochs`th and the last epoch (by max_epochs or max_steps): in their validation, where
    ModelCheckpoint looks for the value, else at their end. In between the value stays: give ModelCheckpoint and
    EarlyStopping the same `every_n_epochs`, or see that they do not take it for that of later weights.

    Batches are (inputs, labels), or (inputs, labels, groups) where samples of one patient, slide or scene are not to
    vote for each other. The inputs are moved to the device and given to `module` as the loader has them (hooks such as
    on_after_batch_transfer are not called), in evaluation mode and under the Trainer's precision. Several processes
    divide the work.

    Training is bitwise the same with and without it: modes, random states and the order of training samples are left
    alone (but for random numbers that a dataset keeps to itself and that training shares with the probe). What makes a
    probe impossible (no labels, fewer voters than k, one class, features that are not finite, no data, an error while
    they are loaded) is said in a warning, and training goes on without a value.

    Args:
        train: loader of labelled samples that vote, without augmentation; None: the datamodule's (or the
            LightningModule's): the first of what its `knn_dataloaders()` gives, or else train_dataloader().
        test: loader of labelled samples that are voted on; None: the second of knn_dataloaders(), or val_dataloader(),
            or test_dataloader().
        module: name of a submodule of the LightningModule that gives features (B, D), as `named_modules()` lists it;
            "" is the LightningModule itself, with its forward.
        k: how many vote.
        temperature: of their weights.
        every_n_epochs: epochs from one probe to the next.
        max_samples: about the most that are taken of each loader, spread evenly over it in whole batches. It bounds the
            memory, to a few times max_samples x D x 4 bytes and 64 MiB of similarities.

    Attributes:
        history: of each probe `epoch`, `step` (optimizer steps) and `top1`. In checkpoints.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: when training starts: a module that is not there, or no data.
    """

    def __init__(
        self,
        train: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        *,
        module: str = "teacher.backbone",
        k: int = 20,
        temperature: float = 0.07,
        every_n_epochs: int = 1,
        max_samples: int = 50_000,
    ) -> None:
        check_integer("k", k, 1)
        check_number("temperature", temperature, 0, float("inf"), exclude_minimum=True)
        check_integer("every_n_epochs", every_n_epochs, 1)
        check_integer("max_samples", max_samples, 1)
        self.train, self.test, self.module = train, test, module
        self.k, self.temperature = k, temperature
        self.every_n_epochs, self.max_samples = every_n_epochs, max_samples
        self.history: list[dict[str, float]] = []
        self._loaders: Loaders | None = None  # while it trains
        self._last: tuple[int, int] | None = None  # epoch and step of the last attempt
        self._warned: set[str] = set()

    @property
    def receipt(self) -> str | None:
        """The last accuracy and the best; None before the first."""
        if not self.history:
            return None
        last, best = self.history[-1], max(self.history, key=lambda probe: probe["top1"])
        return (
            f"knn/top1 {last['top1']:.4f} in epoch {last['epoch']:.0f}, the best {best['top1']:.4f} in "
            f"epoch {best['epoch']:.0f}"
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        self._loaders = self._last = None
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self.history = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find module and data."""
        find_submodule(pl_module, self.module, "module=...")
        with evaluation(pl_module):  # making loaders may draw random numbers
            self._loaders = labelled_loaders(trainer, self.train, self.test, type(self).__name__)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe where ModelCheckpoint will look for the value."""
        self._probe(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe, if no validation has."""
        if self._last != (trainer.current_epoch, trainer.global_step):
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the datamodule's loaders, and say what was found."""
        self._loaders = None
        if self.receipt:
            rank_zero_info(self.receipt)

    def state_dict(self) -> dict[str, Any]:
        """The accuracies so far."""
        return {"history": self.history, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.history = state_dict["history"]

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        is_last = epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        if self._loaders is None or not (epoch == 0 or (epoch + 1) % self.every_n_epochs == 0 or is_last):
            return
        self._last = epoch, trainer.global_step
        try:
            with evaluation(pl_module):
                top1 = self._accuracy(trainer, pl_module, self._loaders)
        except ValueError as error:
            if str(error) not in self._warned:
                self._warned.add(str(error))
                rank_zero_warn(f"knn/top1 has no value in epoch {epoch}, and training goes on: {error}")
            return
        self.history.append({"epoch": float(epoch), "step": float(trainer.global_step), "top1": top1})
        pl_module.log("knn/top1", top1, prog_bar=True, sync_dist=True)

    def _accuracy(self, trainer: Trainer, pl_module: LightningModule, loaders: Loaders) -> float:
        module = find_submodule(pl_module, self.module, "module=...")
        train, test = (extract(trainer, pl_module, module, loader, self.max_samples) for loader in loaders)
        # Each process has all features, and so finds the same.
        knn = KNNAccuracy(
            train.features, train.labels, self.k, self.temperature, groups=train.groups, sync_on_compute=False
        ).to(pl_module.device)
        knn.update(*test)
        return float(knn.compute())
