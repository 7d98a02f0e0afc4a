"""Conversion of a checkpoint's tensors to a DINOProjectionHead: its arguments, and the form of the last layer.

Sizes: D bottleneck width, K prototypes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino_head.checkpoints._layouts import FoundHead, listed
from dino_head.head import DINOProjectionHead, options_of
from dino_head.prototypes import WeightNormPrototypes, weight_norm

Tensors = Mapping[str, Tensor]


def check_whole(tensors: Mapping[str, object], remedy: str) -> None:
    """Raise ValueError for a tensor that is sharded, quantised, sparse or on the meta device."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter):
            kind = f"a {type(tensor).__name__}"
        elif tensor.layout is not torch.strided or tensor.is_nested:
            kind = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
        elif tensor.is_meta:
            kind = "a tensor without memory (on the meta device)"
        else:
            continue
        raise ValueError(f"{key} is {kind}, expected an ordinary tensor: {remedy}")


def fit_head(
    found: FoundHead, head: DINOProjectionHead | None = None, norm_last_layer: bool | None = None
) -> tuple[DINOProjectionHead, dict[str, Tensor]]:
    """Return a module for the head of a checkpoint, and the module's state dict.

    Args:
        found: Head of a checkpoint.
        head: Module to use. By default, a new one on the meta device.
        norm_last_layer: As in `load_head`.

    Raises:
        ValueError: The head is incomplete or not finite, or does not fit the module.
    """
    name = f"the head {found.path!r}" if found.path else "the head"
    if len(found.roots) > 1:
        roots = listed(sorted(found.roots))
        raise ValueError(f"{name} appears twice, as {roots}: pass a state dict with only one of them")
    if found.unexplained:
        raise ValueError(
            f"{name} has unexpected keys {listed(found.unexplained)}: if it is complete without them, pass a state "
            "dict without them"
        )
    check_whole({found.names[key]: tensor for key, tensor in found.tensors.items()}, "gather it with full_tensor()")
    arguments = arguments_for(found.tensors, norm_last_layer)
    target = head
    if target is None:
        with torch.device("meta"):
            target = DINOProjectionHead(**arguments)
    try:
        return target, state_for(target, found.tensors, found.names)
    except ValueError as error:
        if head is None:
            raise ValueError(f"{name} would be {constructor_call(arguments)}, but {error}") from None
        own = arguments_for(head.state_dict())
        unlike = [f"{key}={value}, expected {own[key]}" for key, value in arguments.items() if value != own[key]]
        detail = f" ({listed(unlike)})" if unlike else ""
        raise ValueError(f"{name} does not fit the given head{detail}: {error}") from None


def constructor_call(arguments: Mapping[str, Any]) -> str:
    """`DINOProjectionHead(input_dim=...)`, for messages."""
    return f"DINOProjectionHead({', '.join(f'{name}={value}' for name, value in arguments.items())})"


def arguments_for(tensors: Tensors, norm_last_layer: bool | None = None) -> dict[str, Any]:
    """Arguments of DINOProjectionHead, inferred from keys and shapes; `norm_last_layer` as in `load_head`."""
    options = options_of(tensors)
    if norm_last_layer is None and "last_layer.weight_g" in tensors:
        norm_last_layer = bool((tensors["last_layer.weight_g"] == 1).all())
    return {**options, "norm_last_layer": norm_last_layer}


def with_last_layer(tensors: Tensors, *, is_weight_normed: bool) -> dict[str, Tensor]:
    """The same head with a plain last layer, w_k = g_k v_k / ||v_k||, or a weight-normed one, v = w and g = ||w||."""
    converted = dict(tensors)
    if is_weight_normed and "last_layer.weight" in converted:
        weight = converted.pop("last_layer.weight")
        converted["last_layer.weight_g"] = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        converted["last_layer.weight_v"] = weight
    if not is_weight_normed and "last_layer.weight_v" in converted:
        prototypes = weight_norm(converted.pop("last_layer.weight_v"), converted.pop("last_layer.weight_g"))
        converted["last_layer.weight"] = prototypes
    return converted


def state_for(target: DINOProjectionHead, tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Copies of the tensors of a head as the state dict of `target`.

    Args:
        target: Module for the state dict. If it is on the meta device, the copies have the highest precision of the
            tensors, or torch's default if that is higher.
        tensors: Tensors by our keys.
        names: Keys of the checkpoint by our keys, for error messages.

    Raises:
        ValueError: The tensors do not fit, or are not finite.
    """
    _check_fit(target, tensors, names)
    precision = torch.get_default_dtype()
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:  # float8 cannot be promoted
            precision = torch.promote_types(precision, tensor.dtype)
    wide = {  # so that a converted last layer is rounded only once, at the end
        key: tensor.to(precision) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()
    }
    layer = target.last_layer
    converted = with_last_layer(wide, is_weight_normed=isinstance(layer, WeightNormPrototypes))
    if isinstance(layer, WeightNormPrototypes) and not layer.trainable_norm:
        plain = tensors.get("last_layer.weight")
        check_finite(wide, names)
        _fix_norms(converted, tolerance=0.0 if plain is None else 1e-6 + torch.finfo(plain.dtype).eps)
    state = {}
    for key, value in target.state_dict().items():
        is_new = value.is_meta and value.is_floating_point()
        # Old files lack num_batches_tracked.
        found = converted[key] if key in converted else torch.zeros((), device="cpu")
        state[key] = found.to(precision if is_new else value.dtype, copy=True, memory_format=torch.contiguous_format)
    check_finite(state, names)
    return state


def check_finite(tensors: Tensors, names: Mapping[str, str]) -> None:
    """Raise ValueError for values that are not finite, or that make the outputs not finite."""
    for key, tensor in tensors.items():
        bad, problem = ~tensor.isfinite(), "not finite"
        if key.endswith("running_var"):
            bad, problem = bad | (tensor < 0), "negative or not finite"
        if bad.any():
            raise ValueError(
                f"{int(bad.sum()):,} of {tensor.numel():,} values of {names.get(key, key)} are {problem} in "
                f"{tensor.dtype}: use an earlier checkpoint or a higher precision"
            )
    if "last_layer.weight_v" in tensors:
        bad = ~weight_norm(tensors["last_layer.weight_v"], tensors["last_layer.weight_g"]).isfinite().all(dim=1)
        if bad.any():
            dtype = tensors["last_layer.weight_v"].dtype
            raise ValueError(
                f"{int(bad.sum()):,} prototypes have a norm of 0 in {dtype}, by which weight norm divides: use a "
                "higher precision, or a head without weight norm"
            )


def _check_fit(target: DINOProjectionHead, tensors: Tensors, names: Mapping[str, str]) -> None:
    shapes = {key: value.shape for key, value in target.state_dict().items()}
    if ("last_layer.weight" in tensors) != ("last_layer.weight" in shapes):  # state_for converts it
        size = shapes.pop("last_layer.weight", None) or shapes.pop("last_layer.weight_v")
        shapes.pop("last_layer.weight_g", None)
        if "last_layer.weight" in tensors:
            shapes["last_layer.weight"] = size
        else:
            shapes |= {"last_layer.weight_g": torch.Size((size[0], 1)), "last_layer.weight_v": size}
    problems = []
    for key in {**shapes, **tensors}:
        if key not in tensors:
            if not key.endswith("num_batches_tracked"):
                problems.append(f"{key} is missing")
        elif key not in shapes:
            problems.append(f"{names[key]} is unexpected")
        elif tensors[key].shape != shapes[key]:
            problems.append(f"{names[key]} has shape {tuple(tensors[key].shape)}, expected {tuple(shapes[key])}")
        elif not tensors[key].is_floating_point() and not key.endswith("num_batches_tracked"):
            problems.append(f"{names[key]} has type {tensors[key].dtype}, expected a floating-point type")
    if problems:
        raise ValueError(listed(problems))


def _fix_norms(tensors: dict[str, Tensor], tolerance: float) -> None:
    norms = tensors["last_layer.weight_g"]
    if (norms - 1).abs().max() > tolerance:
        raise ValueError(
            f"norm_last_layer=True needs prototypes of norm 1, got norms from {norms.min():.6g} to {norms.max():.6g}: "
            "use norm_last_layer=False, which keeps the norms and trains them"
        )
    tensors["last_layer.weight_g"] = torch.ones_like(norms)
