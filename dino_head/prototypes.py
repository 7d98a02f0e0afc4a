"""The last layer of the DINO head: K prototypes that score unit vectors.

Sizes: D bottleneck width, K prototypes.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_head._keys import add_remedy


class FactoredLogits(NamedTuple):
    """The two factors of the logits `z @ prototypes.T`, not yet multiplied.

    The logits of many views and many prototypes are the largest tensor of a DINO step. Losses and metrics accept their
    factors instead, to avoid materialising them.

    Args:
        z: Unit vectors (..., D).
        prototypes: Effective weights of the last layer, (K, D).

    >>> factored = FactoredLogits(torch.ones(2, 5, 8), torch.ones(32, 8))
    >>> factored.logits().shape
    torch.Size([2, 5, 32])
    """

    z: Tensor
    prototypes: Tensor

    def logits(self) -> Tensor:
        """Multiply the factors: (..., D) and (K, D) -> (..., K)."""
        return F.linear(self.z, self.prototypes)


def weight_norm(weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """Rows of `weight_v` (K, D) scaled to the norms `weight_g` (K, 1).

    w_k = g_k v_k / ||v_k||, Salimans and Kingma 2016 (arXiv:1602.07868), equation 2.
    """
    # The fused kernel is private and may disappear; the formula below gives the same values, but is slower.
    kernel: Callable[[Tensor, Tensor, int], Tensor] | None = getattr(torch, "_weight_norm", None)
    if kernel is None:
        norms: Tensor = torch.linalg.vector_norm(weight_v, dim=1, keepdim=True)
        return weight_v * (weight_g / norms)
    return kernel(weight_v, weight_g, 0)


class Prototypes(nn.Module):
    """A last layer: K prototypes that score unit vectors, a linear map without bias."""

    def factored(self, z: Tensor) -> FactoredLogits:
        """Unit vectors (..., D) -> unit vectors and prototypes, not yet multiplied."""
        return FactoredLogits(z, self._prototypes())

    def forward(self, z: Tensor) -> Tensor:
        """Unit vectors (..., D) -> logits (..., K)."""
        return self.factored(z).logits()

    def _prototypes(self) -> Tensor:
        """The weight as a new tensor, because fully_shard frees the parameters' memory after forward."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected_keys: list[str] = args[-2]
        remedy = "or convert the weights with dino_head.checkpoints.load_head(..., head=head)"
        add_remedy(unexpected_keys, f"{prefix}weight", f"from a plain last layer, set norm_last_layer=None, {remedy}")
        add_remedy(
            unexpected_keys, f"{prefix}weight_v", f"from weight norm, set norm_last_layer=True or False, {remedy}"
        )


class WeightNormPrototypes(Prototypes):
    """K weight-normalised prototypes: w_k = g_k v_k / ||v_k||.

    The state dict contains the directions `weight_v` (K, D) and the norms `weight_g` (K, 1), under the keys of
    `torch.nn.utils.weight_norm`. The effective `weight` is computed at each use, so that the module can be copied,
    pickled and compiled after use.

    Fixed norms are a buffer of ones, so `requires_grad_(True)` does not make them trainable. Loading a state dict with
    other norms raises an error.

    Args:
        bottleneck_dim: Width D of the bottleneck.
        output_dim: Number K of prototypes.
        trainable_norm: Whether the norms are trained; otherwise they stay 1.
    """

    weight_g: Tensor

    def __init__(self, bottleneck_dim: int, output_dim: int, *, trainable_norm: bool = False) -> None:
        super().__init__()
        self.trainable_norm = trainable_norm
        if trainable_norm:
            self.weight_g = nn.Parameter(torch.empty(output_dim, 1))
        else:
            self.register_buffer("weight_g", torch.empty(output_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(output_dim, bottleneck_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the directions like the weight of `nn.Linear`, and set every norm to 1."""
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)
        self.weight_g.fill_(1.0)

    @property
    def weight(self) -> Tensor:
        """The effective prototypes, shape (K, D)."""
        # Fixed norms are a new tensor of ones, not the buffer: DDP writes to buffers before each forward, after which
        # autograd refuses the backward of an earlier one, and fully_shard does not shard them with `weight_v`.
        norms = self.weight_g if self.trainable_norm else torch.ones_like(self.weight_v[:, :1])
        return weight_norm(self.weight_v, norms)

    def _prototypes(self) -> Tensor:
        return self.weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        norms = state_dict.get(prefix + "weight_g")
        if not self.trainable_norm and isinstance(norms, Tensor) and not norms.is_meta and bool((norms != 1).any()):
            error_msgs: list[str] = args[-1]
            error_msgs.append(
                f"{prefix}weight_g has norms from {norms.min():.6g} to {norms.max():.6g}, but norm_last_layer=True "
                "fixes them to 1: use DINOProjectionHead(norm_last_layer=False), which keeps the norms and trains them"
            )
            state_dict[prefix + "weight_g"] = torch.ones_like(norms)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        output_dim, bottleneck_dim = self.weight_v.shape
        return f"{bottleneck_dim=}, {output_dim=}, trainable_norm={self.trainable_norm}"


class LinearPrototypes(Prototypes):
    """K prototypes without weight norm, a plain `weight` (K, D): the last layer of DINOv3 (arXiv:2508.10104).

    Args:
        bottleneck_dim: Width D of the bottleneck.
        output_dim: Number K of prototypes.
    """

    def __init__(self, bottleneck_dim: int, output_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_dim, bottleneck_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise with a truncated normal distribution (std 0.02)."""
        nn.init.trunc_normal_(self.weight, std=0.02)

    def _prototypes(self) -> Tensor:
        return self.weight.clone()

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        output_dim, bottleneck_dim = self.weight.shape
        return f"{bottleneck_dim=}, {output_dim=}"


def cancel_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set the gradients to None, so that an optimizer skips the parameters.

    With zeros instead, weight decay and momentum would still change the parameters.
    """
    for parameter in parameters:
        parameter.grad = None
