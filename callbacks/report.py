"""A page with pictures of a run, to be looked at while it trains and afterwards."""

import io
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dino_head._arguments import check_integer
from dino_head.callbacks._access import find_submodule
from dino_head.callbacks._features import Loaders, as_text, evaluation, is_sharded, labelled_loaders
from dino_head.callbacks._page import page
from dino_head.callbacks._pictures import Maps, Samples, attention_maps, patch_tokens, take_samples
from dino_head.callbacks.collapse_monitor import CollapseMonitorCallback
from dino_head.callbacks.knn_probe import KNNProbeCallback

NO_IMAGES = "No images: give ReportCallback or KNNProbeCallback two loaders. "
Kind = TypeVar("Kind", bound=Callback)


class ReportCallback(Callback):
    """Writes a page about the run, `report.html`, and its pictures as PNG files.

        Trainer(callbacks=[CollapseMonitorCallback(), KNNProbeCallback(train, test), ReportCallback("runs/mine"), ...])

    It shows what the other callbacks have seen: from CollapseMonitorCallback the loss split into entropy and KL against
    ln K, the rank, the schedules and the diagnosis; from KNNProbeCallback the accuracy; and the receipts of all.
    And what features it finds in labelled or unlabelled images: a map of the held-out ones (principal components), some
    of them beside their nearest neighbours among the training ones, and, of backbones that offer the methods of the
    authors' models, the first three principal components of the patch tokens as colours
    (`get_intermediate_layers(images, n=1)`) and the attention of the class token (`get_last_selfattention(images)`).

    `curves.json` holds what is drawn of the course, and can be laid under that of another run: `reference`.

    The page is one file without links to others. It is written after each validation, in a run without validation
    every `every_n_epochs` epochs, and at the end; each file appears whole or not at all. Loggers that take images
    (`log_image`, or an `experiment` with `add_image`) get the pictures too. What cannot be drawn is said in a warning,
    and training goes on; it is bitwise the same with and without the report. `fast_dev_run` writes none. Needs
    matplotlib.

    Args:
        dirpath: folder for the files; None: the logger's, or the Trainer's default_root_dir.
        train: loader of images among which neighbours are looked for, (images, labels) or images alone; None: that of
            KNNProbeCallback, if there is one, else the datamodule's, if there is one, else there are no such pictures.
        test: loader of held-out images; None: likewise.
        module: as for KNNProbeCallback, whose own is taken with its loaders.
        every_n_epochs: in a run without validation.
        max_samples: about the most that are taken of each loader, spread evenly over it.
        reference: the curves.json of a run that went well, drawn as dashed lines: its loss and entropy per ln K, and
            its kNN accuracy, at the same share of the run.

    Raises:
        ValueError: an argument out of range, or a reference that is no curves.json.
        MisconfigurationException: when training starts: a report of another run in the folder, one loader without the
            other, or no such module.
        ModuleNotFoundError: no matplotlib.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        train: Iterable[Any] | None = None,
        test: Iterable[Any] | None = None,
        *,
        module: str = "teacher.backbone",
        every_n_epochs: int = 10,
        max_samples: int = 1000,
        reference: str | Path | None = None,
    ) -> None:
        check_integer("every_n_epochs", every_n_epochs, 1)
        check_integer("max_samples", max_samples, 1)
        self.dirpath, self.train, self.test, self.module = dirpath, train, test, module
        self.every_n_epochs, self.max_samples = every_n_epochs, max_samples
        self._reference = None if reference is None else read_curves(Path(reference))
        self._folder = Path()
        self._source: tuple[str, Loaders] | None = None
        self._written, self._seconds = 0, 0.0

    @property
    def receipt(self) -> str | None:
        """Where the page is, and the time it took; None before the first."""
        if not self._written:
            return None
        return f"{self._folder / 'report.html'} written {self._written} times, in {self._seconds:.1f} s together"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:
            self._written, self._seconds = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder, and refuse to overwrite a report of another run."""
        _figures()
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        exists = trainer.strategy.broadcast((self._folder / "report.html").exists())
        if exists and trainer.global_step == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"{self._folder} holds the report of another run: move it away, or give ReportCallback another dirpath"
            )

        self._source = self._find_source(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a run without validation: when all callbacks are done with the epoch before."""
        epochs = trainer.current_epoch
        if not trainer.enable_validation and epochs and epochs % self.every_n_epochs == 0 and trainer.global_step:
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each validation of a fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last state of things."""
        self._write(trainer, pl_module)
        rank_zero_info(self.receipt)

    def state_dict(self) -> dict[str, Any]:
        """How often it was written, and how long that took."""
        return {"written": self._written, "seconds": self._seconds, "receipt": self.receipt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self._written, self._seconds = state_dict["written"], state_dict["seconds"]

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        start = time.perf_counter()
        try:
            with evaluation(pl_module):
                self._draw(trainer, pl_module, start)
        except Exception as error:  # a picture is not worth a run
            rank_zero_warn(f"no report in epoch {trainer.current_epoch}, and training goes on: {as_text(error)}")
            return
        self._written += 1
        self._seconds += time.perf_counter() - start

    def _draw(self, trainer: Trainer, pl_module: LightningModule, start: float) -> None:
        monitor, probe = _find(trainer, CollapseMonitorCallback), _find(trainer, KNNProbeCallback)
        train, test, maps = self._images(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        looks, probes = monitor.history if monitor else [], probe.history if probe else []
        pictures = []
        curves = {"steps": trainer.estimated_stepping_batches, "looks": looks, "probes": probes}
        if looks or probes:
            replace_file(self._folder / "curves.json", json.dumps(curves).encode())
        reference = None if self._reference is None else stretched(self._reference, curves)
        for name, title, caption, figure in _figures().draw(looks, probes, train, test, maps, reference):
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=100)
            pictures.append((title, caption, png.getvalue()))
            file = self._folder / f"{name}.png"
            replace_file(file, png.getvalue())
            _send(trainer, f"report/{name}", file)
        subtitle = (
            f"{type(pl_module).__name__} after {trainer.current_epoch} whole epochs, {trainer.global_step} optimizer "
            f"steps. Figures are those of the last look. {'' if self._source else NO_IMAGES}"
            f"Drawn in {time.perf_counter() - start:.1f} s."
        )
        receipts = [getattr(c, "receipt", None) for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        text = page(
            subtitle,
            _numbers(looks, probes),
            _verdict(monitor),
            monitor.diagnoses if monitor else [],
            pictures,
            [receipt for receipt in receipts if isinstance(receipt, str)],
        )
        replace_file(self._folder / "report.html", text.encode())

    def _images(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Samples | None, Samples | None, Maps]:
        """Training and held-out samples, and maps of the first held-out ones; what fails is said and left out."""
        train = test = None
        maps = Maps()
        if self._source is None:
            return train, test, maps
        name, loaders = self._source
        module = find_submodule(pl_module, name, "module=...")
        if not trainer.is_global_zero and not is_sharded(module):
            return train, test, maps
        try:
            train, test = (take_samples(trainer, pl_module, module, loader, self.max_samples) for loader in loaders)
            if test.inputs is not None:
                maps = Maps(patch_tokens(module, test.inputs), attention_maps(module, test.inputs))
        except Exception as error:  # of whatever is in the data or the module
            rank_zero_warn(
                f"a report with fewer pictures in epoch {trainer.current_epoch}, and training goes on: {as_text(error)}"
            )
        return train, test, maps

    def _find_source(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str, Loaders] | None:
        """Module and loaders: those given, KNNProbeCallback's, or the datamodule's; None if there are none."""
        train, test, name = self.train, self.test, self.module
        probe = _find(trainer, KNNProbeCallback)
        if probe is not None and train is None and test is None:
            train, test, name = probe.train, probe.test, probe.module
        try:
            with evaluation(pl_module):  # making loaders may draw random numbers
                loaders = labelled_loaders(trainer, train, test, type(self).__name__)
        except MisconfigurationException:
            if train is not None or test is not None:
                raise
            return None
        find_submodule(pl_module, name, "module=...")
        return name, loaders


def read_curves(file: Path) -> dict[str, Any]:
    """What a report has written: `steps` of the whole run, and the `looks` and `probes` of its callbacks."""
    try:
        curves: dict[str, Any] = json.loads(file.read_text())
        stretched(curves, curves)
    except Exception as error:  # whatever is in the file
        raise ValueError(
            f"reference={str(file)!r} is not the curves.json of a ReportCallback ({type(error).__name__}: {error})"
        ) from error
    return curves


def stretched(reference: dict[str, Any], curves: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of the reference's curves, as if its run had been as long as this one."""
    steps, looks, probes = reference["steps"], reference["looks"], reference["probes"]
    scale = curves["steps"] / steps if math.isfinite(curves["steps"]) and math.isfinite(steps) else 1.0
    return {
        name: ([row["step"] * scale for row in rows], [row[name] for row in rows])
        for name, rows in (("loss_normalized", looks), ("teacher_entropy_normalized", looks), ("top1", probes))
    }


def replace_file(file: Path, content: bytes) -> None:
    """Write the file whole or not at all, whatever happens on the way."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _figures() -> Any:
    try:
        from dino_head.callbacks import _figures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ReportCallback draws with matplotlib: pip install matplotlib ({error})") from error
    return _figures


def _find(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]


def _verdict(monitor: CollapseMonitorCallback | None) -> str:
    """What to say where nothing was diagnosed."""
    if monitor is None:
        return "Nobody looked: there is no CollapseMonitorCallback in this Trainer."
    if not monitor.has_judged:
        return f"Too early to tell: a diagnosis needs {monitor.patience} looks."
    return "Nothing is wrong, as far as the statistics of the loss can tell."


def _numbers(looks: list[dict[str, float]], probes: list[dict[str, float]]) -> dict[str, str]:
    """The last values, by their names on the page."""
    numbers = {}
    for look in looks[-1:]:
        numbers["loss, nats"] = f"{look['loss']:.3f}"
        numbers["loss, normalized"] = f"{look['loss_normalized']:.3f}"
        numbers["teacher entropy"] = f"{look['teacher_entropy']:.3f}"
        numbers["KL"] = f"{look['kl']:.3f}"
        numbers["RankMe"] = f"{look['rankme']:.1f}"
        numbers["prototype perplexity"] = f"{look['prototype_perplexity']:.1f}"
    for probe in probes[-1:]:
        numbers["kNN top-1"] = f"{100 * probe['top1']:.2f}%"
    return numbers


def _send(trainer: Trainer, name: str, file: Path) -> None:
    """To the loggers that take images: Weights & Biases and others by log_image, TensorBoard by add_image."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[str(file)], step=trainer.global_step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            pixels = _figures().read(file)
            logger.experiment.add_image(  # type: ignore[attr-defined]
                name, pixels, trainer.global_step, dataformats="HWC"
            )
