"""Read the tensors of a checkpoint: no code runs, files are memory-mapped, and errors name the kind of a wrong file."""

import argparse
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_head._extras import packages_of_extras

# Files without weights that failed downloads and conversions produce, by their first bytes.
NO_WEIGHTS = {
    b"<": "a web page: the address needs a login, or is not the address of the file itself",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    b"\x89HDF": "an HDF5 file: convert it to safetensors",
    b"\x1f\x8b": "a gzip archive: unpack it first",
}

DEEPEST = 20  # levels of nested dictionaries; a Lightning checkpoint has about 6
ALLOWING = threading.Lock()  # torch's list of allowed classes is global


class Contents(NamedTuple):
    """A checkpoint with its nested dictionaries flattened to paths such as `teacher.head.mlp.0.weight`."""

    tensors: dict[str, Tensor]  # mapped from the file, so that only those in use are read
    others: list[str]  # paths of other values


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Contents:
    """Read a state dict, a file written by torch.save, a safetensors file or the JSON index of sharded safetensors.

    Raises:
        ValueError: The source is something else.
        OSError: The file cannot be opened.
    """
    if isinstance(source, Mapping):
        return flatten(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"expected a path or a state dict, got {type(source).__name__}: for a module, pass module.state_dict()"
        )
    file = Path(source)
    if file.is_dir():
        raise ValueError(_about_folder(file))
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is a pipe or a device, expected a file that can be read twice: save it first")
    with open(file, "rb") as opened:
        start = opened.read(32)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size:  # the header's length
        return Contents(_read_safetensors(file), [])
    for beginning, what in NO_WEIGHTS.items():
        if start.lstrip().startswith(beginning):
            raise ValueError(f"{file} contains no weights: it is {what}")
    if not start.strip():
        raise ValueError(f"{file} is {'blank' if start else 'empty'}: download or copy it again")
    if start.lstrip().startswith(b"{"):
        return Contents(_read_shards(file), [])
    return flatten(_read_torch(file, is_zip=start.startswith(b"PK\x03\x04")))


def flatten(source: Mapping[str, Any]) -> Contents:
    """Flatten nested dictionaries."""
    tensors: dict[str, Tensor] = {}
    others = []
    for path, value in _leaves(source, ""):
        if not isinstance(value, Tensor):
            others.append(path)
        elif path in tensors:
            raise ValueError(f"{path} appears twice, once in a nested dictionary: pass only one of the two")
        else:
            tensors[path] = value
    return Contents(tensors, others)


def _leaves(node: Mapping[Any, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > DEEPEST:
        raise ValueError(
            f"dictionaries are nested more than {DEEPEST} levels deep, or contain themselves, at {prefix[:99]}: pass "
            "the state dict of the head"
        )
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _read_torch(file: Path, is_zip: bool) -> Mapping[str, Any]:
    """torch.load without running code. It allows argparse.Namespace, which the authors' files contain."""
    with ALLOWING:
        is_allowed = argparse.Namespace in torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([] if is_allowed else [argparse.Namespace]):
            try:
                # Files saved by torch before 1.6 are not zip archives and cannot be mapped.
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
            except Exception as error:  # depends on the file
                raise ValueError(_about_pickle(file, is_zip, error)) from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file} contains a {type(loaded).__name__}, expected a state dict or a checkpoint's dict")
    return loaded


def _about_pickle(file: Path, is_zip: bool, error: Exception) -> str:
    """The reason why torch.load rejected a file, without its advice to run the code in the file."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if is_zip else []
    except Exception:  # damaged as well
        names = []
    names = names or re.findall(r"GLOBAL (\S+)", str(error))
    if names:
        return (
            f"{file} is refused: besides tensors it contains {', '.join(names)}, which could run code. No code ran. "
            "Allow classes that you know to be harmless with torch.serialization.add_safe_globals([...]), save the "
            "state dict alone if you trust the file's author, or ask for safetensors"
        )
    reason = re.search(r"(?:WeightsUnpickler error: |Trying to |Can only )[^\n]+", str(error))
    return (
        f"{file} ({file.stat().st_size:,} bytes) is neither safetensors nor a file of torch.save, or is incomplete "
        f"({type(error).__name__}{': ' + reason[0].strip() if reason else ''}): download or copy it again, and compare "
        "its size"
    )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    with packages_of_extras(f"reading {file}"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size:,} bytes) is an incomplete safetensors file ({error}): download or copy it "
            "again"
        ) from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read sharded safetensors. The index lists the file of each tensor, in its own folder."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{index} is no index of sharded safetensors: expected JSON with a 'weight_map' of file names"
        ) from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, expected the name of a safetensors file in the same folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing: download all {len(names)} files into its folder")
        shard = _read_safetensors(index.parent / name)
        unlike = sorted(shard.keys() ^ {key for key, place in places.items() if place == name})
        if unlike:
            raise ValueError(
                f"{index} and {name} disagree about {', '.join(unlike[:5])}: download all files again, together"
            )
        tensors |= shard
    return tensors


def _about_folder(folder: Path) -> str:
    if (folder / ".metadata").exists() or any(folder.glob("*.distcp")):
        return (
            f"{folder} is a checkpoint in shards of several processes: convert it to one file with "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER` (or, without Lightning, "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`)"
        )
    kinds = (".safetensors", ".index.json", ".pt", ".pth", ".ckpt", ".bin")
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(kinds))
    return f"{folder} is a folder, expected a file: it contains {', '.join(files) or 'no file of weights'}"
