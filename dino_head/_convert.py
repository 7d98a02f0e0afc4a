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


def check_whole(tensors: Tensors, remedy: str) -> None:
    """Raise ValueError for tensors without values of their own: shards, quantised, on the meta device."""
    for key, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            kind = "a tensor without memory (on the meta device)" if tensor.is_meta else f"a {type(tensor).__name__}"
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
    """The same head with a last layer of this form: w_k = g_k v_k / ||v_k||, or from it v = w and g = ||w||.

    Raises:
        ValueError: a row is zero, which has no direction.
    """
    converted = dict(tensors)
    if is_weight_normed and "last_layer.weight" in converted:
        weight = converted.pop("last_layer.weight")
        converted["last_layer.weight_g"] = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        converted["last_layer.weight_v"] = weight
    if "last_layer.weight_v" in converted:
        zeros = int((converted["last_layer.weight_v"] == 0).all(dim=1).sum())
        if zeros:
            raise ValueError(f"{zeros} rows of the prototypes are zero, and weight norm divides by their norms")
        if not is_weight_normed:
            prototypes = weight_norm(converted.pop("last_layer.weight_v"), converted.pop("last_layer.weight_g"))
            converted["last_layer.weight"] = prototypes
    return converted


def state_for(target: DINOProjectionHead, tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a head as the state dict of `target`, in copies.

    Args:
        target: what is to hold them. On the meta device it takes their precision, or torch's default if that is higher.
        tensors: by our keys.
        names: by our keys, how the errors call them.

    Raises:
        ValueError: they do not fit, or are not finite.
    """
    _check_fit(target, tensors, names)
    default = torch.get_default_dtype()
    wide = {  # a last layer that is converted is rounded once, at the end
        key: tensor.to(torch.promote_types(tensor.dtype, default)) if tensor.is_floating_point() else tensor
        for key, tensor in tensors.items()
    }
    _check_finite(wide, names)
    layer = target.last_layer
    wide = with_last_layer(wide, is_weight_normed=isinstance(layer, WeightNormPrototypes))
    if isinstance(layer, WeightNormPrototypes) and not layer.weight_g.requires_grad:
        plain = tensors.get("last_layer.weight")
        _fix_norms(wide, tolerance=0.0 if plain is None else 16 * torch.finfo(plain.dtype).eps)
    state = {}
    for key, value in target.state_dict().items():
        tensor = wide.get(key, torch.tensor(0))  # older files do not count the batches of a batch norm
        takes_precision = value.is_meta and value.is_floating_point()
        state[key] = tensor.to(tensor.dtype if takes_precision else value.dtype, copy=True)
    _check_finite(state, names)
    return state


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


def _check_finite(tensors: Tensors, names: Mapping[str, str]) -> None:
    for key, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{bad:,} of {tensor.numel():,} values of {names.get(key, key)} are not finite as {tensor.dtype}: take "
                "a checkpoint from before they were not, or a head of a higher precision"
            )


def _fix_norms(tensors: dict[str, Tensor], tolerance: float) -> None:
    norms = tensors["last_layer.weight_g"]
    if (norms - 1).abs().max() > tolerance:
        raise ValueError(
            f"norm_last_layer=True fixes the norms of the prototypes at 1, but they are {norms.min():.6g} to "
            f"{norms.max():.6g}: with norm_last_layer=False they stay what they are, and trainable"
        )
    tensors["last_layer.weight_g"] = torch.ones_like(norms)
