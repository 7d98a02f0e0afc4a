"""Reading the tensors of a checkpoint: safely, lazily, and with errors that say what the file is instead."""

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

# What people find in place of a file of weights, by its first bytes.
NO_WEIGHTS = {
    b"<": "a web page: the address needs a login, or is not that of the file itself",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    b"\x89HDF": "an HDF5 file: convert it to safetensors",
    b"\x1f\x8b": "a gzip archive: unpack it first",
}

DEEPEST = 20  # nesting of dictionaries; that of a Lightning checkpoint is about 6
ALLOWING = threading.Lock()  # torch's list of allowed classes is one for all threads


class Contents(NamedTuple):
    """What a checkpoint holds, nested dictionaries joined to paths: `teacher.head.mlp.0.weight`."""

    tensors: dict[str, Tensor]  # of a file: mapped from it, so that only what is used is read
    others: list[str]


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Contents:
    """The tensors of a state dict or file: torch.save's, safetensors, or the JSON index of sharded safetensors.

    Raises:
        ValueError: anything else.
        OSError: the file cannot be opened.
    """
    if isinstance(source, Mapping):
        return flatten(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"expected a path or a state dict, got {type(source).__name__}: of a module pass module.state_dict()"
        )
    file = Path(source)
    if file.is_dir():
        raise ValueError(_about_folder(file))
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is a pipe or a device, expected a file: save it first, it is read more than once")
    with open(file, "rb") as opened:
        start = opened.read(32)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= file.stat().st_size:  # the length of a header
        return Contents(_read_safetensors(file), [])
    for beginning, what in NO_WEIGHTS.items():
        if start.lstrip().startswith(beginning):
            raise ValueError(f"{file} holds no weights: it is {what}")
    if not start.strip():
        raise ValueError(f"{file} is {'blank' if start else 'empty'}: download or copy it again")
    if start.lstrip().startswith(b"{"):
        return Contents(_read_shards(file), [])
    return flatten(_read_torch(file, is_zip=start.startswith(b"PK\x03\x04")))


def flatten(source: Mapping[str, Any]) -> Contents:
    """Nested dictionaries as one."""
    tensors: dict[str, Tensor] = {}
    others = []
    for path, value in _leaves(source, ""):
        if not isinstance(value, Tensor):
            others.append(path)
        elif path in tensors:
            raise ValueError(f"{path} is there twice, once in a nested dictionary: pass the part you mean alone")
        else:
            tensors[path] = value
    return Contents(tensors, others)


def _leaves(node: Mapping[Any, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > DEEPEST:
        raise ValueError(f"dictionaries are nested more than {DEEPEST} times, or in themselves, at {prefix[:99]}")
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _read_torch(file: Path, is_zip: bool) -> Mapping[str, Any]:
    """torch.load without running anything that the file asks for. The authors' files hold their options as well."""
    with ALLOWING:
        is_allowed = argparse.Namespace in torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([] if is_allowed else [argparse.Namespace]):
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)  # others cannot be mapped
            except Exception as error:  # whatever is in the file
                raise ValueError(_about_pickle(file, is_zip, error)) from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file} holds a {type(loaded).__name__}, expected a state dict or a checkpoint's dictionary")
    return loaded


def _about_pickle(file: Path, is_zip: bool, error: Exception) -> str:
    """Why torch.load refused. Its own text advises to run what is in the file; this one does not."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if is_zip else []
    except Exception:  # damaged as well
        names = []
    names = names or re.findall(r"GLOBAL (\S+)", str(error))
    if names:
        return (
            f"{file} is refused: besides tensors it holds {', '.join(names)}, which could run code. Nothing of it ran. "
            "What you know to be harmless you can allow, torch.serialization.add_safe_globals([...]); if you trust who "
            "made the file, save its state dict alone; or ask for its weights as safetensors"
        )
    reason = re.search(r"(?:WeightsUnpickler error: |Trying to |Can only )[^\n]+", str(error))
    return (
        f"{file} ({file.stat().st_size:,} bytes) is neither safetensors nor what torch.save writes, or not all of it "
        f"({type(error).__name__}{': ' + reason[0].strip() if reason else ''}): download or copy it again, and compare "
        "its size"
    )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f"{file} needs the package safetensors: pip install safetensors") from None
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size:,} bytes) is no whole safetensors file ({error}): download or copy it again"
        ) from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Sharded safetensors: the index says which file beside it holds which tensor."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{index} is JSON or the like, but no index of sharded safetensors: it has no 'weight_map' of file names"
        ) from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}, expected the name of a safetensors file beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"{name} is missing, which {index} names: download all {len(names)} files beside it")
        shard = _read_safetensors(index.parent / name)
        unlike = sorted(shard.keys() ^ {key for key, place in places.items() if place == name})
        if unlike:
            raise ValueError(
                f"{index} and {name} do not fit, in {', '.join(unlike[:5])}: download all files again, together"
            )
        tensors |= shard
    return tensors


def _about_folder(folder: Path) -> str:
    if (folder / ".metadata").exists() or any(folder.glob("*.distcp")):
        return (
            f"{folder} is a checkpoint in shards of several processes: write it as one file with "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER` (or, without Lightning, "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`)"
        )
    kinds = (".safetensors", ".index.json", ".pt", ".pth", ".ckpt", ".bin")
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(kinds))
    return f"{folder} is a folder, expected a file: it has {', '.join(files) or 'no file of weights'}"
