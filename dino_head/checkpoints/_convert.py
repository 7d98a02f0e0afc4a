"""The tensors of a head, by our keys, as the state of a module: which module they need, and in which form.

Sizes: D bottleneck width, K prototypes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_head.head import DINOProjectionHead
from dino_head.prototypes import WeightNormPrototypes, weight_norm

Tensors = Mapping[str, Tensor]


def listed(items: Sequence[str], most: int = 8) -> str:
    """The first of them, separated by commas, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def check_whole(tensors: Mapping[str, object], remedy: str) -> None:
    """Raise ValueError for what is no ordinary tensor: shards, quantised, sparse, on the meta device."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter):
            kind = f"a {type(tensor).__name__}"
        elif tensor.layout is not torch.strided or tensor.is_nested:
            kind = f"a tensor of layout {tensor.layout}, or nested"
        elif tensor.is_meta:
            kind = "a tensor without memory (on the meta device)"
        else:
            continue
        raise ValueError(f"{key} is {kind}, expected an ordinary tensor: {remedy}")


def arguments_for(tensors: Tensors, norm_last_layer: bool | None = None) -> dict[str, Any]:
    """The arguments of DINOProjectionHead that keys and shapes tell; see `load_head` for norm_last_layer."""
    matrices = {
        int(key.split(".")[1]): tensor
        for key, tensor in tensors.items()
        if key.startswith("layers.") and key.endswith(".weight") and tensor.ndim == 2
    }
    prototypes = tensors.get("last_layer.weight_v", tensors.get("last_layer.weight"))
    if not matrices:
        raise ValueError("its MLP has no matrix, expected the weights of Linear layers")
    if prototypes is None or prototypes.ndim != 2:
        raise ValueError("its last layer has no matrix, expected prototypes of shape (K, D)")
    first, last = matrices[min(matrices)], matrices[max(matrices)]
    biases = {f"layers.{index}.bias" in tensors for index in matrices}
    if norm_last_layer is None and "last_layer.weight_g" in tensors:
        norm_last_layer = bool((tensors["last_layer.weight_g"] == 1).all())
    return {
        "input_dim": first.shape[1],
        "hidden_dim": first.shape[0],
        "bottleneck_dim": last.shape[0],
        "output_dim": prototypes.shape[0],
        "batch_norm": any(key.endswith(".running_mean") for key in tensors),
        "norm_last_layer": norm_last_layer,
        "num_layers": len(matrices),
        "bias": biases.pop() if len(biases) == 1 else None,
    }


def with_last_layer(tensors: Tensors, *, is_weight_normed: bool) -> dict[str, Tensor]:
    """The same head with a last layer of this form: w_k = g_k v_k / ||v_k||, or from it v = w and g = ||w||."""
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
    """The tensors of a head as the state dict of `target`, in copies.

    Args:
        target: what is to hold them. On the meta device it takes the highest of their precisions, or torch's default if
            that is higher.
        tensors: by our keys.
        names: by our keys, how the errors call them.

    Raises:
        ValueError: they do not fit, or are not finite.
    """
    _check_fit(target, tensors, names)
    precision = torch.get_default_dtype()
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:  # those of 8 bits cannot be promoted
            precision = torch.promote_types(precision, tensor.dtype)
    wide = {  # a last layer that is converted is rounded once, at the end
        key: tensor.to(precision) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()
    }
    layer = target.last_layer
    converted = with_last_layer(wide, is_weight_normed=isinstance(layer, WeightNormPrototypes))
    # Of a teacher, of which nothing is trainable, it cannot be said whether the norms are to stay 1.
    if isinstance(layer, WeightNormPrototypes) and layer.weight_v.requires_grad and not layer.weight_g.requires_grad:
        plain = tensors.get("last_layer.weight")
        check_finite(wide, names)
        _fix_norms(converted, tolerance=0.0 if plain is None else 1e-6 + torch.finfo(plain.dtype).eps)
    state = {}
    for key, value in target.state_dict().items():
        is_new = value.is_meta and value.is_floating_point()
        # Older files do not count the batches of a batch norm.
        found = converted[key] if key in converted else torch.zeros((), device="cpu")
        state[key] = found.to(precision if is_new else value.dtype, copy=True, memory_format=torch.contiguous_format)
    check_finite(state, names)
    return state


def check_finite(tensors: Tensors, names: Mapping[str, str]) -> None:
    """Raise ValueError for values that are not finite, and for those that would make outputs that are not."""
    for key, tensor in tensors.items():
        bad, problem = ~tensor.isfinite(), "not finite"
        if key.endswith("running_var"):
            bad, problem = bad | (tensor < 0), "negative or not finite"
        if bad.any():
            raise ValueError(
                f"{int(bad.sum()):,} of {tensor.numel():,} values of {names.get(key, key)} are {problem} in "
                f"{tensor.dtype}: take a checkpoint from before they were, or a higher precision"
            )
    if "last_layer.weight_v" in tensors:
        bad = ~weight_norm(tensors["last_layer.weight_v"], tensors["last_layer.weight_g"]).isfinite().all(dim=1)
        if bad.any():
            dtype = tensors["last_layer.weight_v"].dtype
            raise ValueError(
                f"{int(bad.sum()):,} rows of the prototypes have a norm of 0 in {dtype}, and weight norm divides by it"
            )


def _check_fit(target: DINOProjectionHead, tensors: Tensors, names: Mapping[str, str]) -> None:
    shapes = {key: value.shape for key, value in target.state_dict().items()}
    if ("last_layer.weight" in tensors) != ("last_layer.weight" in shapes):  # going to be converted
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
            problems.append(f"{names[key]} has no place in it")
        elif tensors[key].shape != shapes[key]:
            problems.append(f"{names[key]} has shape {tuple(tensors[key].shape)}, expected {tuple(shapes[key])}")
        elif not tensors[key].is_floating_point() and not key.endswith("num_batches_tracked"):
            problems.append(f"{names[key]} is of {tensors[key].dtype}, expected floating-point numbers")
    if problems:
        raise ValueError(listed(problems))


def _fix_norms(tensors: dict[str, Tensor], tolerance: float) -> None:
    norms = tensors["last_layer.weight_g"]
    if (norms - 1).abs().max() > tolerance:
        raise ValueError(
            f"norm_last_layer=True fixes the norms of the prototypes at 1, but they are {norms.min():.6g} to "
            f"{norms.max():.6g}: with norm_last_layer=False they stay what they are, and trainable"
        )
    tensors["last_layer.weight_g"] = torch.ones_like(norms)
