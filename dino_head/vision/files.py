"""Files that cannot be read: left out, counted and listed, and never the end of a run."""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset


class BadFiles:
    """Names in a text file, a line each, to which all workers and processes add.

    Args:
        file: is there only if there are names.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, name: str, reason: Exception) -> None:
        """Add a name, and what is wrong; the same one may come again."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(f"{_line(name)}\t{_line(str(reason))}\n")

    def names(self) -> list[str]:
        """Each of them once."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return sorted({line.split("\t")[0] for line in lines})


def _line(text: str) -> str:
    """A text of any characters in one line."""
    return ascii(text)[1:-1]


def walk(folder: str) -> list[str]:
    """The files of a folder, however deep, also behind links, in an order that is always the same; none is hidden."""
    found, seen = [], set()
    for at, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(at)
        folders[:] = [] if here in seen else [name for name in folders if not name.startswith(".")]
        found += [] if here in seen else [os.path.join(at, name) for name in files if not name.startswith(".")]
        seen.add(here)
    return sorted(found)


def fingerprint(files: Sequence[str]) -> str:
    """A short description of a list of files; a resumed run needs the same files in the same order."""
    return f"{len(files)} files, {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"


class Readable(Dataset[Any]):
    """A dataset in which the next sample that can be read stands in for one that cannot.

    Args:
        samples: raises whatever is wrong with a sample; has `name(index)`, for the list.
        bad_files: the list.
    """

    def __init__(self, samples: Any, bad_files: BadFiles) -> None:
        self.samples, self.bad_files = samples, bad_files
        self.bad = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # whichever worker met it

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        for at in itertools.chain(range(index, len(self)), range(index)):
            if not self.bad[at]:
                try:
                    return self.samples[at]
                except Exception as error:  # of what a file may hold, nothing is worth a run
                    self.bad[at] = True
                    self.bad_files.add(self.samples.name(at), error)
        raise ValueError(f"not one of {len(self)} files can be read; they are listed in {self.bad_files.file}")


class FileData(LightningDataModule):
    """Data from files; says at the end of a run, however it ends, how many were bad, and where they are listed."""

    @property
    def bad_files(self) -> BadFiles:
        """In the folder of the run, the Trainer's default_root_dir."""
        return BadFiles(Path(self.trainer.default_root_dir if self.trainer else ".") / "bad_files.txt")

    def setup(self, stage: str) -> None:
        """Begin the list, unless a run goes on."""
        run = self.trainer
        if stage == "fit" and run and run.is_global_zero and not run.ckpt_path:
            self.bad_files.file.unlink(missing_ok=True)

    def teardown(self, stage: str) -> None:
        """Say it."""
        bad = self.bad_files
        if bad.names() and self.trainer and self.trainer.is_global_zero:
            print(f"{len(bad.names())} files could not be read and were left out: {bad.file}")

    def on_exception(self, exception: BaseException) -> None:
        """Say it too."""
        self.teardown("fit")
