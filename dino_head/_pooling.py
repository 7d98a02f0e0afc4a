"""Kinds of a backbone's outputs, and descriptions of those that are not features (B, D) yet, for error messages."""

from collections.abc import Mapping
from typing import TypeGuard

from torch import Tensor

TOKENS = "tokens[:, 0] (the class token) or tokens.mean(dim=1)"
MAPS = "maps.flatten(2).mean(dim=2)"


def is_pair(output: object) -> TypeGuard[tuple[Tensor, Tensor]]:
    """Whether an output is a pair of class tokens (B, D) and patch tokens (B, N, D)."""
    items = output if isinstance(output, tuple) else ()
    return [item.ndim for item in items if isinstance(item, Tensor)] == [2, 3] and len(items) == 2


def shapes_of(output: object) -> str:
    """Type of an output, and its shape or the shapes of its items."""
    if isinstance(output, (tuple, list)):
        kinds = [tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__ for item in output]
        return f"a {type(output).__name__} of {kinds}"
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def how_to_pool(output: object) -> str:
    """The kind of an output, and how to get features (B, D) from it."""
    remedy = "wrap the backbone in dino_head.vision.Features(backbone, function) with a function that returns"
    if isinstance(output, Tensor):
        shape = tuple(output.shape)
        if output.ndim == 3:
            return f"tokens (B, N, D) of shape {shape}: {remedy} {TOKENS}"
        if output.ndim > 3:
            return f"feature maps (B, D, H, W) of shape {shape}: {remedy} {MAPS}"
        return f"a tensor of shape {shape}: {remedy} features (B, D)"
    name = type(output).__name__
    tokens = getattr(output, "last_hidden_state", None)
    if isinstance(tokens, Tensor):
        pick = "class_token" if tokens.ndim == 3 else "pooled"
        return (
            f"a {name} of Transformers: wrap the model in dino_head.vision.Features(model, {pick}), with {pick} from "
            "dino_head.vision.backbones"
        )
    if isinstance(output, Mapping):
        keys = ", ".join(repr(key) for key in output)
        return f"a {name} with the keys {keys}: {remedy} the features of one key"
    if isinstance(output, (tuple, list)):
        return f"{shapes_of(output)}: {remedy} the features of one item"
    return f"a {name}: {remedy} features (B, D)"
