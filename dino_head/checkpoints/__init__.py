"""Load and export heads: from the DINO authors' checkpoints, other libraries and Lightning runs.

dino-head inspect FILE      # shows the heads of a file, and how load_head maps each key
"""

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dino_head.checkpoints._convert import check_finite, check_whole, fit_head, with_last_layer
from dino_head.checkpoints._files import read
from dino_head.checkpoints._layouts import LAYOUTS, find_heads, listed, parse, select
from dino_head.checkpoints._report import head_lines, other_lines
from dino_head.head import DINOProjectionHead

__all__ = ["export_head", "load_head"]

logger = logging.getLogger("dino_head.checkpoints")


def load_head(
    source: str | os.PathLike[str] | Mapping[str, Any],
    part: str = "teacher",
    *,
    head: DINOProjectionHead | None = None,
    norm_last_layer: bool | None = None,
) -> DINOProjectionHead:
    """Load the DINO head of a checkpoint.

        head = load_head("dino_vitbase16_pretrain_full_checkpoint.pth")
        load_head("last.ckpt", "student", head=module.student["head"])

    It reads the keys of DINO, DINOv2, DINOv3, solo-learn, lightly, lightly-train, nidl and this library (listed at
    `export_head`), under any prefix and in nested dictionaries. Keys and shapes determine the head except for the
    activation, which is GELU in all of these projects. The logger `dino_head.checkpoints` logs the mapping of each key
    at level INFO. A key of the head that has no counterpart in the module raises an error.

    Files are read with `torch.load(weights_only=True)` or as safetensors, so no code in them runs. They are
    memory-mapped, so only the head stays in memory. (Files saved by torch before 1.6 cannot be mapped.)

    Args:
        source: File written by torch.save (a state dict or a full training checkpoint), safetensors file, index of
            sharded safetensors (`*.safetensors.index.json`), or state dict.
        part: Path of the head or a part of the path, such as "student" or "teacher.dino_head". "teacher" also matches
            paths with "momentum" or "ema"; "student" also matches the other head if one is a teacher's.
        head: Head to load into; it stays unchanged after an error. By default, a new head in float32 or the highest
            precision of its tensors, whichever is higher.
        norm_last_layer: Option of `DINOProjectionHead` for a new head. By default, True if each `weight_g` is 1, False
            if one is not, and None (no weight norm) if the checkpoint has no `weight_g`.

    Returns:
        The head, in training mode if it is new. Its outputs equal those of the head in the checkpoint.

    Raises:
        ValueError: No head or several match; the head has missing or unexpected keys, wrong shapes or values that are
            not finite; the file is not a checkpoint.
        OSError: The file cannot be opened.
    """
    if norm_last_layer not in (None, True, False):
        raise ValueError(f"norm_last_layer must be True, False or None, got {norm_last_layer!r}")
    if head is not None:
        _check_head(head)
        check_whole(head.state_dict(), "load the weights before the head is sharded and after its memory is allocated")
        if norm_last_layer is not None:
            raise ValueError(
                f"norm_last_layer={norm_last_layer} is an option of a new head: pass head or norm_last_layer, not both"
            )
    contents = read(source)
    try:
        found = select(find_heads(contents.tensors, contents.others), part)
        target, state = fit_head(found, head, norm_last_layer)
    except ValueError as error:
        name = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
        raise ValueError(f"no head was loaded from {name}: {error}") from None
    target.load_state_dict(state, assign=head is None)
    why = "into the given head" if head is not None else ""
    if norm_last_layer is not None:
        why = f"norm_last_layer={norm_last_layer}: as passed"
    logger.info("%s", "\n".join([*head_lines(found, state, why), *other_lines(contents, [found])]))
    return target


def export_head(
    head: DINOProjectionHead, layout: Literal["dino", "dinov3", "lightly", "lightly-train"]
) -> dict[str, Tensor]:
    """Return the head's state dict with the keys of another project.

    The tensors are contiguous copies on the CPU, for torch.save or safetensors:

        torch.save(export_head(head, "dino"), "head.pth")

    Args:
        head: Any DINO head.
        layout: Keys of the result. "dino" (also for DINOv2 and solo-learn): `mlp.{i}.*`, or `mlp.*` if the MLP is a
            single layer, `last_layer.weight_g` and `last_layer.weight_v`. "lightly" (also for nidl): `layers.{i}.*` and
            the same last layer; these are the head's own keys if it has weight norm. "lightly-train" (its DINOv2):
            `mlp.{i}.*`, `last_layer.parametrizations.weight.original0` and `original1`. "dinov3": `mlp.{i}.*` and a
            plain `last_layer.weight`, which equals the weight-normalised one up to rounding. In the layouts with weight
            norm, the rows' norms of a plain last layer become `weight_g`.

    Returns:
        The state dict.

    Raises:
        ValueError: The layout is unknown; `head` is not a DINO head, has additional parameters, or is sharded; a value
            is not finite.
    """
    if layout not in [*LAYOUTS]:
        raise ValueError(
            f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}: use 'dino' for DINOv2 and "
            "solo-learn, 'lightly' for nidl"
        )
    _check_head(head)
    state = head.state_dict()
    unknown = [key for key in state if parse(key) != ("", key)]
    if unknown:
        raise ValueError(f"no layout has keys for {listed(unknown)} of {type(head).__name__}: export a plain head")
    check_whole(state, "gather the head first, with full_tensor() of each DTensor")
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


def _check_head(head: object) -> None:
    if not isinstance(head, DINOProjectionHead):
        raise ValueError(f"expected a DINOProjectionHead, got a {type(head).__name__}: pass the head inside it")
