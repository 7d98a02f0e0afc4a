"""The projection head of DINO: an MLP, an L2-normalised bottleneck and a last layer of prototypes.

Sizes: D bottleneck width, K prototypes; `...` is any number of leading dimensions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dino_head._arguments import check_integer
from dino_head._pooling import MAPS, how_to_pool
from dino_head.prototypes import FactoredLogits, LinearPrototypes, WeightNormPrototypes, cancel_gradients

SUSPICIOUS_HIDDEN_DIM = 16_384  # the largest published heads have 8192 hidden units
Block = tuple[int, int, nn.Module | None, nn.Module | None]


class ProjectionHead(nn.Module):
    """An MLP; each block is a Linear layer, followed by an optional norm and an optional activation.

    The input may have any number of leading dimensions: (B, in), (B, N, in) and more. Batch norm computes its
    statistics over all of them.

    Args:
        blocks: `(in, out, norm module or None, activation or None)` for each layer; the `out` of a block is the `in`
            of the next.
        bias: Whether Linear layers have a bias. By default, only those without batch norm after them have one.

    Raises:
        ValueError: No block, a width that is not a positive integer, or adjacent widths that differ.

    >>> head = ProjectionHead([(384, 512, nn.BatchNorm1d(512), nn.GELU()), (512, 64, None, None)])
    >>> head(torch.randn(2, 10, 384)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(self, blocks: Sequence[Block], *, bias: bool | None = None) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("blocks must contain at least one (in, out, norm, activation), got an empty sequence")
        for i, (width_in, width_out, _, _) in enumerate(blocks):
            check_integer(f"the input width of block {i}", width_in, 1)
            check_integer(f"the output width of block {i}", width_out, 1)
            if i > 0 and width_in != blocks[i - 1][1]:
                raise ValueError(
                    f"block {i} expects inputs of width {width_in}, got {blocks[i - 1][1]} from block {i - 1}: "
                    "make the output width of a block the input width of the next"
                )
        layers: list[nn.Module] = []
        for width_in, width_out, norm, activation in blocks:
            with_bias = not isinstance(norm, _BatchNorm) if bias is None else bias
            layers.append(nn.Linear(width_in, width_out, bias=with_bias))
            layers.extend(module for module in (norm, activation) if module is not None)
        self.layers = nn.Sequential(*layers)
        self.input_dim = blocks[0][0]

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., in) -> projections (..., out).

        Raises:
            ValueError: A wrong width, an input that is not floating point, or a single sample for batch norm in
                training mode.
        """
        self._check_input(x)
        y: Tensor = self.layers(x.reshape(-1, self.input_dim))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _check_input(self, x: object) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"head expects a tensor of features (..., {self.input_dim}), got {how_to_pool(x)}; features of several "
                "views go through the head together, torch.stack(features)"
            )
        shape = tuple(x.shape)
        if not x.is_floating_point():
            raise ValueError(f"head expects floating-point features, got {x.dtype}: convert with x.float()")
        if x.dim() == 0 or shape[-1] != self.input_dim:
            raise ValueError(
                f"head expects inputs of width {self.input_dim} (input_dim), got shape {shape}: {self._remedy(shape)}"
            )
        if x.numel() < 2 * self.input_dim and any(
            isinstance(layer, _BatchNorm) and layer.training for layer in self.layers
        ):
            raise ValueError(
                f"batch norm in training mode needs at least 2 samples, got shape {shape}: use a larger batch "
                "(drop_last=True avoids a small last one), batch_norm=False, or eval()"
            )

    def _remedy(self, shape: tuple[int, ...]) -> str:
        """Remedy for inputs of a wrong width."""
        if not shape:
            return "pass features of shape (..., input_dim)"
        for trailing in range(1, len(shape) - 1):
            if shape[-1 - trailing] == self.input_dim:
                return (
                    f"if these are feature maps with {self.input_dim} channels in dimension {-1 - trailing}, pass "
                    f"their mean, x.flatten({-trailing}).mean(dim=-1)"
                )
        if len(shape) > 3:
            return (
                f"if these are feature maps (B, D, H, W), pass their mean, {MAPS}, and set input_dim={shape[-3]}; if "
                f"these are tokens, set input_dim={shape[-1]}"
            )
        return f"set input_dim={shape[-1]} or use another backbone"


class DINOProjectionHead(ProjectionHead):
    """The projection head of DINO (Caron et al. 2021, arXiv:2104.14294, section 3.1 and appendix C).

    It consists of `num_layers - 1` blocks of Linear, batch norm (optional) and GELU, a Linear to the bottleneck, L2
    normalisation, and a last layer of prototypes without bias:

        z = h / ||h||,  h = MLP(x)                (..., D)
        logits = z @ prototypes.T                 (..., K)

    Args:
        input_dim: Width of the backbone's features.
        hidden_dim: Width of the hidden layers of the MLP.
        bottleneck_dim: Width D of the bottleneck, the output of the MLP.
        output_dim: Number K of prototypes, the output of the head.
        batch_norm: Whether batch norm follows each hidden Linear. (The authors train ViTs without it.)
        freeze_last_layer: Number of epochs for which `FreezeLastLayerCallback` freezes the last layer; -1 and 0 for
            none.
        norm_last_layer: True for prototypes of unit norm, False for trainable norms, None for a plain linear map
            without weight norm (DINOv3).
        num_layers: Number of Linear layers of the MLP, including the one to the bottleneck.
        bias: Whether Linear layers have a bias. By default, only those without batch norm after them have one.

    Raises:
        ValueError: A size or `num_layers` that is not a positive integer, `freeze_last_layer` < -1, or a `hidden_dim`
            of at least 16,384 that is larger than `output_dim` (the authors' order of arguments is in, out).

    >>> head = DINOProjectionHead(384, 512, 64, 4096, batch_norm=False)
    >>> head(torch.randn(2, 10, 384)).shape
    torch.Size([2, 10, 4096])
    >>> z, prototypes = head.factored_logits(torch.randn(2, 10, 384))
    >>> z.shape, prototypes.shape
    (torch.Size([2, 10, 64]), torch.Size([4096, 64]))
    """

    def __init__(
        self,
        input_dim: int = 2048,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 4096,
        batch_norm: bool = True,
        freeze_last_layer: int = -1,
        norm_last_layer: bool | None = True,
        *,
        num_layers: int = 3,
        bias: bool | None = None,
    ) -> None:
        sizes = {
            "input_dim": input_dim,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "output_dim": output_dim,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            check_integer(name, size, 1)
        check_integer("freeze_last_layer", freeze_last_layer, -1, " (epochs; -1 and 0 freeze nothing)")
        if norm_last_layer not in (None, True, False):
            raise ValueError(f"norm_last_layer must be True, False or None, got {norm_last_layer!r}")
        if hidden_dim >= SUSPICIOUS_HIDDEN_DIM and hidden_dim > output_dim:
            raise ValueError(
                f"hidden_dim={hidden_dim} is larger than output_dim={output_dim}: for {hidden_dim} prototypes, use "
                f"DINOProjectionHead({input_dim}, output_dim={hidden_dim}), as the positional order is input_dim, "
                "hidden_dim, bottleneck_dim, output_dim"
            )
        widths = [input_dim] + [hidden_dim] * (num_layers - 1)
        hidden: list[Block] = [
            (width, hidden_dim, nn.BatchNorm1d(hidden_dim) if batch_norm else None, nn.GELU()) for width in widths[:-1]
        ]
        super().__init__([*hidden, (widths[-1], bottleneck_dim, None, None)], bias=bias)
        self.last_layer: WeightNormPrototypes | LinearPrototypes
        if norm_last_layer is None:
            self.last_layer = LinearPrototypes(bottleneck_dim, output_dim)
        else:
            self.last_layer = WeightNormPrototypes(bottleneck_dim, output_dim, trainable_norm=not norm_last_layer)
        self.freeze_last_layer = freeze_last_layer
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors do: truncated normal weights (std 0.02) and zero biases in the MLP."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, _BatchNorm):
                layer.reset_parameters()
        self.last_layer.reset_parameters()

    @overload
    def forward(self, x: Tensor, *, factored: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, *, factored: Literal[True]) -> FactoredLogits: ...

    def forward(self, x: Tensor, *, factored: bool = False) -> Tensor | FactoredLogits:
        """Features (..., input_dim) -> logits (..., K), or their factors.

        `factored_logits` calls it too: a subclass overrides `forward` alone, and passes `factored` on.

        Args:
            x: Features (..., input_dim).
            factored: Whether to return FactoredLogits; `factored_logits` sets it to True.
        """
        h = super().forward(x)
        # In float16, 1e-12 rounds to 0, and a zero vector would become NaN.
        z = F.normalize(h, dim=-1, eps=1e-6 if h.dtype == torch.float16 else 1e-12)
        out = self.last_layer.factored(z)
        return out if factored else out.logits()

    def factored_logits(self, x: Tensor) -> FactoredLogits:
        """Features (..., input_dim) -> unit vectors (..., D) and prototypes (K, D), not yet multiplied.

        It calls the module, so that hooks, `head.compile()` and `fully_shard` apply as they do for `head(x)`. After
        `compiled = torch.compile(head)`, call `compiled(x, factored=True)`: PyTorch compiles no other method.
        """
        factored: FactoredLogits = self(x, factored=True)
        return factored

    def cancel_last_layer_gradients(self, current_epoch: int) -> None:
        """Set the gradients of the last layer to None while `current_epoch < freeze_last_layer`.

        Call it between backward and the optimizer's step, as `FreezeLastLayerCallback` does. The layer then stays
        bitwise unchanged, whatever the optimizer's weight decay and momentum.
        """
        if current_epoch < self.freeze_last_layer:
            cancel_gradients(self.last_layer.parameters())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.state_dict()
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if any(key in own and value.shape != own[key].shape for key, value in given.items()):
            error_msgs: list[str] = args[-1]
            error_msgs.extend(_unlike_options(own, given))
        super()._load_from_state_dict(state_dict, prefix, *args)


def options_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of DINOProjectionHead, inferred from the keys and shapes of a state dict.

    `norm_last_layer` is None without weight norm and otherwise True, because the keys do not tell True from False.

    Raises:
        ValueError: The MLP or the last layer has no matrix.
    """
    matrices = {
        int(key.split(".")[1]): tensor
        for key, tensor in tensors.items()
        if key.startswith("layers.") and key.endswith(".weight") and tensor.ndim == 2
    }
    prototypes = tensors.get("last_layer.weight_v", tensors.get("last_layer.weight"))
    if not matrices:
        raise ValueError("the MLP has no matrix, expected the weights of Linear layers")
    if prototypes is None or prototypes.ndim != 2:
        raise ValueError("the last layer has no matrix, expected prototypes of shape (K, D)")
    first, last = matrices[min(matrices)], matrices[max(matrices)]
    biases = {f"layers.{index}.bias" in tensors for index in matrices}
    return {
        "input_dim": first.shape[1],
        "hidden_dim": first.shape[0],
        "bottleneck_dim": last.shape[0],
        "output_dim": prototypes.shape[0],
        "batch_norm": any(key.endswith(".running_mean") for key in tensors),
        "norm_last_layer": True if "last_layer.weight_g" in tensors else None,
        "num_layers": len(matrices),
        "bias": biases.pop() if len(biases) == 1 else None,
    }


def _unlike_options(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """The error message if the state dicts of this and another head differ in options, as a list; else empty."""
    try:
        expected, found = options_of(own), options_of(given)
    except ValueError:  # not a complete head: PyTorch lists the keys
        return []
    names = [name for name in found if found[name] != expected[name]]
    if not names:
        return []
    here, there = (", ".join(f"{name}={options[name]}" for name in names) for options in (expected, found))
    return [
        f"the state dict is from a head with {there}, but this one has {here}: set these options of "
        "DINOProjectionHead, or load the head with dino_head.checkpoints.load_head, which makes one that fits"
    ]
