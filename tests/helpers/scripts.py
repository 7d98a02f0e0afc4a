"""Runs of the example scripts in processes of their own, stopped where a test wants it. Importable by name."""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import multiprocessing

from helpers.processes import START_METHOD


def run_script(script: Path, arguments: Sequence[str], log: Path, *callbacks: Callback) -> int:
    """The exit code of a script, whose output goes to the file `log` and whose Trainer gets the callbacks as well."""
    process = multiprocessing.get_context(START_METHOD).Process(target=_run, args=(script, arguments, log, callbacks))
    process.start()
    process.join()
    return process.exitcode


def _run(script: Path, arguments: Sequence[str], log: Path, callbacks: Sequence[Callback]) -> None:
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    multiprocessing.set_start_method(None, force=True)  # else loaders' workers would start as this process did
    fit = Trainer.fit

    def fit_with_callbacks(trainer, *args, **options):
        trainer.callbacks.extend(callbacks)
        fit(trainer, *args, **options)

    Trainer.fit = fit_with_callbacks
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


class SendSignal(Callback):
    """Sends a signal to its process, in the middle of the training step after `step` optimizer steps."""

    def __init__(self, number: int, step: int, rank: int = 0):
        self.number, self.step, self.rank = number, step, rank

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            os.kill(os.getpid(), self.number)
