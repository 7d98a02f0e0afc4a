"""Lists of files, and a dataset that replaces the files that cannot be read."""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset


def list_files(folder: str) -> list[str]:
    """All files below a folder, in sorted order. Links are followed; hidden files and folders are skipped."""
    found, seen = [], set()
    for at, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(at)
        folders[:] = [] if here in seen else [name for name in folders if not name.startswith(".")]
        found += [] if here in seen else [os.path.join(at, name) for name in files if not name.startswith(".")]
        seen.add(here)
    return sorted(found)


def select_files(folder: str, is_used: Callable[[str], bool]) -> list[str]:
    """The files below a folder for which `is_used` is true. The others are counted by extension and logged."""
    from lightning.pytorch.utilities import rank_zero_info  # `read_volume` does not need Lightning

    files = list_files(folder)
    used = [file for file in files if is_used(file)]
    if len(used) < len(files):
        others = Counter(os.path.splitext(file)[1].lower() for file in sorted({*files} - {*used}))
        counts = [f"{count} {extension or 'without extension'}" for extension, count in others.most_common(6)]
        more = others.total() - sum(count for _, count in others.most_common(6))
        counts += [f"{more} with other extensions"] if more else []
        rank_zero_info(
            printable(f"{folder}: {len(used)} of {len(files)} files are used. Not used: {', '.join(counts)}")
        )
    return used


def printable(text: str) -> str:
    r"""The text with an escape, such as \udce9, for each byte of a file's name that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def fingerprint(files: Sequence[str | None]) -> str:
    """The number of files and a hash of their names in order: a resumed run needs the same files in this order."""
    return f"{len(files)} files, {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"


class BadFiles:
    """A text file with the names of unreadable files, one per line. All workers and processes append to it.

    Args:
        file: Path of the text file, which is created with the first name.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, name: str, reason: Exception) -> None:
        """Append a name and the reason; the same name may be added more than once."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(f"{_one_line(name)}\t{_one_line(str(reason))}\n")

    def names(self) -> list[str]:
        """The names, without duplicates."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return sorted({line.split("\t")[0] for line in lines})


def _one_line(text: str) -> str:
    """The text in ASCII, with line breaks and non-ASCII characters escaped."""
    return ascii(text)[1:-1]


class ReplaceUnreadable(Dataset[Any]):
    """A dataset that returns the next readable sample instead of an unreadable one.

    Args:
        samples: Dataset that raises an error for an unreadable sample and has a method `name(index)`.
        bad_files: List to which unreadable samples are added.

    Raises:
        ValueError: If no sample can be read.
    """

    def __init__(self, samples: Any, bad_files: BadFiles) -> None:
        self.samples, self.bad_files = samples, bad_files
        self.bad = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # the workers share it

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        for at in itertools.chain(range(index, len(self)), range(index)):
            if not self.bad[at]:
                try:
                    return self.samples[at]
                except Exception as error:  # an unreadable file must not end a run
                    self.bad[at] = True
                    self.bad_files.add(self.samples.name(at), error)
        raise ValueError(f"none of {len(self)} files can be read: see the reasons in {self.bad_files.file}")
