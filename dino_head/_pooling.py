"""Descriptions of a backbone's outputs that are not features (B, D) yet, for error messages."""

from collections.abc import Mapping

from torch import Tensor

TOKENS = "tokens[:, 0] (the class token) or tokens.mean(dim=1)"
MAPS = "maps.flatten(2).mean(dim=2)"


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
        kinds = [tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__ for item in output]
        return f"a {name} of {kinds}: {remedy} the features of one item"
    return f"a {name}: {remedy} features (B, D)"
