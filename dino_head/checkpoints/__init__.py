"""Weights in and out: the heads of the DINO authors, of the libraries around them and of Lightning runs.

dino-head inspect FILE      # the heads of a file, and how load_head maps each key
"""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dino_head.checkpoints._convert import arguments_for, check_finite, check_whole, listed, state_for, with_last_layer
from dino_head.checkpoints._files import Contents, read
from dino_head.checkpoints._layouts import LAYOUTS, FoundHead, find_heads, parse, select, without_wrappers
from dino_head.head import DINOProjectionHead

logger = logging.getLogger("dino_head.checkpoints")


def load_head(
    source: str | os.PathLike[str] | Mapping[str, Any],
    part: str = "teacher",
    *,
    head: DINOProjectionHead | None = None,
    norm_last_layer: bool | None = None,
) -> DINOProjectionHead:
    """The DINO head of a checkpoint, with the same outputs.

        head = load_head("dino_vitbase16_pretrain_full_checkpoint.pth")
        load_head("last.ckpt", "student", head=module.student["head"])

    It takes the keys of DINO, DINOv2, DINOv3, solo-learn, lightly, lightly-train, nidl and this library (listed at
    `export_head`), under any prefix and in nested dictionaries. They and the shapes tell everything but the activation,
    which is GELU in all of these. What became of each key is logged, by the logger `dino_head.checkpoints` at level
    INFO; a key of the head that has no place in it is an error.

    Files are read with `torch.load(weights_only=True)`, so that nothing in them runs, or as safetensors. They are
    mapped into memory, and of a checkpoint of any size only the head is held. (Files in the format of before torch 1.6
    cannot be mapped.)

    Args:
        source: a file of torch.save (a state dict, or the checkpoint of a whole training), a safetensors file, the
            index of a sharded one (`*.safetensors.index.json`), or a state dict.
        part: which head, where there are several: its path or a part of it, such as "student" or "teacher.dino_head".
            The teacher's is also one with "momentum" or "ema" in its path, and the student's then the one without.
        head: load into this one; after an error it is as it was. None makes one, in float32 or the weights' own
            precision if that is higher.
        norm_last_layer: of a new head; see `DINOProjectionHead`. None: True if each `weight_g` is 1, False if one is
            not, and no weight norm if the checkpoint has none.

    Raises:
        ValueError: there is no such head, or several; it has keys too few or too many, shapes that do not fit or values
            that are not finite; the file is something else.
        OSError: the file cannot be opened.
    """
    if norm_last_layer not in (None, True, False):
        raise ValueError(f"norm_last_layer must be True, False or None, got {norm_last_layer!r}")
    if head is not None:
        _check_head(head)
        check_whole(head.state_dict(), "load the head before it is sharded, and after it has memory")
        if norm_last_layer is not None:
            raise ValueError("norm_last_layer is that of the head that is given: leave one of the two out")
    contents = read(source)
    try:
        found = select(_heads_of(contents), part)
        target, state = _fit(found, head, norm_last_layer)
    except ValueError as error:
        name = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
        raise ValueError(f"no head was loaded from {name}: {error}") from None
    target.load_state_dict(state, assign=head is None)
    why = "into the head that was given" if head is not None else ""
    if norm_last_layer is not None:
        why = f"norm_last_layer={norm_last_layer}: asked for"
    logger.info("%s", "\n".join([*_report(found, state, why), *_rest(contents, [found])]))
    return target


def export_head(
    head: DINOProjectionHead, layout: Literal["dino", "dinov3", "lightly", "lightly-train"]
) -> dict[str, Tensor]:
    """The head's state dict under the keys of another project: copies in main memory, for torch.save or safetensors.

        torch.save(export_head(head, "dino"), "head.pth")

    Args:
        head: any DINO head.
        layout: "dino" (and DINOv2, solo-learn): `mlp.{i}.*`, of a single layer `mlp.*`, and `last_layer.weight_g` and
            `weight_v`. "lightly" (and nidl): `layers.{i}.*` and the same: the head's own keys, if it has weight norm.
            "lightly-train" (DINOv2 there): `mlp.{i}.*` and `last_layer.parametrizations.weight.original0` and
            `original1`. "dinov3": `mlp.{i}.*` and a plain `last_layer.weight`, which equals the weight-normalised one
            but for rounding. A plain last layer becomes a weight-normalised one with its rows' norms as g.

    Raises:
        ValueError: another layout, no head, or one that is sharded.
    """
    if layout not in [*LAYOUTS]:
        raise ValueError(
            f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}: DINOv2 and solo-learn have the "
            "layout 'dino', nidl has 'lightly'"
        )
    _check_head(head)
    state = head.state_dict()
    unknown = [key for key in state if parse(key) != ("", key)]
    if unknown:
        raise ValueError(f"no layout has a place for {listed(unknown)} of {type(head).__name__}: export a plain head")
    check_whole(state, "gather it first, full_tensor() of a DTensor, into a head that is not sharded")
    mlp, last_layer = LAYOUTS[layout]
    is_single = mlp == "mlp" and len(head.layers) == 1
    exported = {}
    state = with_last_layer(state, is_weight_normed="weight_v" in last_layer)
    check_finite(state, {})
    for key, value in state.items():
        place, name = key.split(".", 1)
        if place == "last_layer":
            theirs = f"last_layer.{last_layer[name]}"
        else:
            theirs = f"{mlp}.{name.removeprefix('0.') if is_single else name}"
        exported[theirs] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return exported


def describe(source: str | os.PathLike[str]) -> tuple[str, bool]:
    """A report of the heads in a checkpoint, as text, and whether `load_head` can load every one of them.

    Args:
        source: The file, as for `load_head`.

    Raises:
        ValueError: The file holds no head, or is no checkpoint.
        OSError: The file cannot be opened.
    """
    contents = read(source)
    heads = _heads_of(contents)
    lines = [f"heads: {', '.join(path or 'the whole file' for path in heads)}"]
    is_loadable = True
    for head in heads.values():
        try:
            report = _report(head, _fit(head)[1])
        except ValueError as error:
            report, is_loadable = [f"error: {error}"], False
        lines += ["", *report]
    return "\n".join([*lines, "", *_rest(contents, heads.values())]), is_loadable


def _check_head(head: object) -> None:
    if not isinstance(head, DINOProjectionHead):
        raise ValueError(f"expected a DINOProjectionHead, got a {type(head).__name__}: pass the head that is inside")


def _heads_of(contents: Contents) -> dict[str, FoundHead]:
    heads = find_heads(contents.tensors, contents.others)
    if not heads:
        hint = ""
        if any(key.endswith("_flat_param") for key in contents.tensors):
            hint = ". These are flat shards of FSDP: save a full state dict, or take the file of the run's evaluation"
        raise ValueError(
            "there is no DINO head (an MLP, mlp.* or layers.*, beside a last_layer.*). There is "
            f"{listed(_groups(contents.tensors, [])) or 'no tensor at all'}: perhaps the backbone alone, and the head "
            f"in the checkpoint of the training{hint}"
        )
    return heads


def _fit(
    found: FoundHead, head: DINOProjectionHead | None = None, norm_last_layer: bool | None = None
) -> tuple[DINOProjectionHead, dict[str, Tensor]]:
    """The module to load into, a new one still without memory, and what it is to hold."""
    name = f"the head {found.path!r}" if found.path else "the head"
    if len(found.roots) > 1:
        raise ValueError(f"{name} is there twice, as {listed(sorted(found.roots))}: pass a state dict with one of them")
    if found.unexplained:
        raise ValueError(
            f"{name} has keys beside it that a DINO head has not, {listed(found.unexplained)}: if it is whole without "
            "them, pass a state dict without them"
        )
    check_whole({found.names[key]: tensor for key, tensor in found.tensors.items()}, "gather it first, full_tensor()")
    arguments = arguments_for(found.tensors, norm_last_layer)
    target = head
    if target is None:
        with torch.device("meta"):
            target = DINOProjectionHead(**arguments)
    try:
        return target, state_for(target, found.tensors, found.names)
    except ValueError as error:
        if head is None:
            raise ValueError(f"{name} would be {_call(arguments)}, but {error}") from None
        own = arguments_for(head.state_dict())
        unlike = [f"{key}={value}, not {own[key]}" for key, value in arguments.items() if value != own[key]]
        raise ValueError(
            f"{name} does not fit the one that was given{f', it has {listed(unlike)}' if unlike else ''}: {error}"
        ) from None


def _report(found: FoundHead, state: Mapping[str, Tensor], why: str = "") -> list[str]:
    """What is loaded, and what became of each key."""
    arguments = arguments_for(state)
    norm = arguments["norm_last_layer"]
    reasons = {None: "there is no weight norm", True: "each weight_g is 1", False: "a weight_g is not 1"}
    lines = [f"{found.path or 'head'}: {_call(arguments)}", f"  {why or f'norm_last_layer={norm}: {reasons[norm]}'}"]
    added = [key for key in state if key not in found.tensors]
    for key, tensor in found.tensors.items():
        becomes = key if key in state else " and ".join(key for key in added if key.startswith("last_layer."))
        converted = "" if key not in state or state[key].dtype == tensor.dtype else f", now {state[key].dtype}"
        lines.append(f"  {found.names[key]} -> {becomes} {tuple(tensor.shape)} {tensor.dtype}{converted}")
    lines.extend(f"  missing: {key}, set to 0" for key in added if not key.startswith("last_layer."))
    return lines


def _call(arguments: Mapping[str, Any]) -> str:
    return f"DINOProjectionHead({', '.join(f'{name}={value}' for name, value in arguments.items())})"


def _rest(contents: Contents, heads: Collection[FoundHead]) -> list[str]:
    """Everything else that is there."""
    used = {name for head in heads for name in [*head.names.values(), *head.unexplained]}
    unused = _groups([name for name in contents.tensors if name not in used], [head.path for head in heads])
    lines = [f"not used: {', '.join(unused)}"] if unused else []
    others = dict.fromkeys(name.split(".")[0] for name in contents.others)
    return [*lines, f"other entries: {', '.join(others)}"] if others else lines


def _groups(names: Collection[str], paths: Collection[str]) -> list[str]:
    """Keys in groups, by the place where they part from the path of a head, and the number in each."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = without_wrappers(name).split(".")
        shared = max((_shared(parts, path.split(".")) for path in paths), default=1)
        rest = ".*" if len(parts) > shared + 1 else ""
        counts[".".join(parts[: shared + 1]) + rest] += 1
    return [f"{group} ({count} tensors)" if count > 1 else group for group, count in counts.items()]


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts are the same from the start."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
