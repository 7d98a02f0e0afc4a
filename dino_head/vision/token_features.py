"""Transformers as backbones with patch tokens and masks, for DINOv2.

Sizes: B images, C channels, H and W pixels, N patches, D features.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dino_head._pooling import is_pair, shapes_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class TokenFeatures(nn.Module):
    """A transformer as a backbone with patch tokens and masks, images (B, C, H, W) -> (B, D) and (B, N, D).

    Without `patch_embedding`, the model must take masks and have a mask token itself: models of Hugging Face
    Transformers with `bool_masked_pos` (Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ViTModel), and models
    with `forward_features(x, masks)` that returns a dict, as in the code of DINOv2's authors.

    For any other model, `patch_embedding` names the convolution that embeds the patches. Its outputs at masked patches
    are replaced by `mask_token`, a trained parameter that starts at zero. The position embeddings must be added after
    it, so that the model knows where the masked patches are. (Oquab et al. 2023, arXiv:2304.07193)

    The mode of the model does not change. `from_pretrained` returns models in evaluation mode: call `train()` on the
    student. In training mode, DINOv3ViTModel rescales its positions randomly by default.

    Args:
        model: Transformer whose input is images (B, C, H, W), or volumes.
        patch_embedding: Name of a convolution in the model, such as "patch_embed.proj". Its stride is the patch size.
        pick: Function that maps the model's output to class tokens (B, D) and patch tokens (B, N, D), needed with
            `patch_embedding`. A model without a class token can use the mean over the patches in its place.
        options: Options of the model's forward, such as interpolate_pos_encoding=True.

    Raises:
        ValueError: A model that takes no masks and no name of a convolution in it, a model without a mask token or a
            patch size, or only one of `patch_embedding` and `pick`.
    """

    def __init__(
        self,
        model: nn.Module,
        patch_embedding: str | None = None,
        pick: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if (patch_embedding is None) != (pick is None):
            raise ValueError(
                f"patch_embedding and pick go together, got patch_embedding={patch_embedding!r} and pick={pick}: pass "
                "the name of the convolution that embeds the patches, and a function that maps the model's output to "
                "class tokens (B, D) and patch tokens (B, N, D), or neither if the model takes masks"
            )
        self.model, self.pick, self.options = model, pick, options
        self._masks: Tensor | None = None  # of the forward in progress
        self._has_masked_pos = _takes(model.forward, "bool_masked_pos")
        if patch_embedding is not None:
            convolution = _convolution(model, patch_embedding)
            self.mask_token = nn.Parameter(convolution.weight.new_zeros(1, convolution.out_channels))
            # deepcopy binds a method, unlike a closure, to the copy: the teacher's hook uses the teacher's mask token.
            convolution.register_forward_hook(self._replace_masked)
            patch_size: Any = convolution.stride
        elif self._has_masked_pos:
            if not any(name.split(".")[-1] == "mask_token" for name, _ in model.named_parameters()):
                raise ValueError(f"{type(model).__name__} has no mask token: create it with use_mask_token=True")
            patch_size = getattr(model.config, "patch_size", None)
        elif _takes(getattr(model, "forward_features", None), "masks"):
            patch_size = getattr(model, "patch_size", None)
        else:
            raise ValueError(
                f"{type(model).__name__} takes no masks: its forward has no argument bool_masked_pos, and it has no "
                "forward_features(x, masks). Pass patch_embedding, the name of the convolution that embeds its patches "
                f"(its convolutions: {_convolutions(model)}), and pick"
            )
        if patch_size is None:
            raise ValueError(f"{type(model).__name__} has no patch_size: set it to the size of a patch in pixels")
        self.patch_size: tuple[int, ...] = (patch_size,) * 2 if isinstance(patch_size, int) else tuple(patch_size)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return class tokens (B, D) and patch tokens (B, N, D).

        Args:
            images: Images (B, C, H, W), or volumes, whose sides are multiples of the patch size.
            masks: Masks (B, N) on the images' device, bool, True = masked.
        """
        sides = tuple(images.shape[2:])
        count = math.prod([side // size for side, size in zip(sides, self.patch_size, strict=False)])
        if masks is not None and (masks.dtype != torch.bool or masks.shape != (len(images), count)):
            raise ValueError(
                f"masks must be bool {(len(images), count)} for {len(images)} images of {sides} in patches of "
                f"{self.patch_size}, got {tuple(masks.shape)} in {masks.dtype}"
            )
        pair = self._tokens(images, masks)
        if not is_pair(pair) or pair[1].shape[1] != count:
            raise ValueError(
                f"expected class tokens (B, D) and patch tokens (B, {count}, D) from {type(self.model).__name__} for "
                f"images of {sides} in patches of {self.patch_size}, got {shapes_of(pair)}: pass patch_embedding, and "
                "a pick that selects these tokens"
            )
        return pair

    def _tokens(self, images: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.pick is not None:
            self._masks = masks
            try:
                return self.pick(self.model(images, **self.options))
            finally:
                self._masks = None
        if self._has_masked_pos:
            tokens = self.model(images, bool_masked_pos=masks, **self.options).last_hidden_state
            registers = getattr(self.model.config, "num_register_tokens", 0)
            return tokens[:, 0], tokens[:, 1 + registers :]
        output = self.model.forward_features(images, masks, **self.options)  # type: ignore[operator]
        return output["x_norm_clstoken"], output["x_norm_patchtokens"]

    def _replace_masked(self, convolution: nn.Module, inputs: Any, maps: Tensor) -> Tensor:
        """Replace the masked patches of feature maps (B, D, *grid) by the mask token."""
        if self._masks is None:
            return maps
        masks = self._masks.reshape(len(maps), 1, *maps.shape[2:])
        token = self.mask_token.to(maps.dtype).reshape(1, -1, *[1] * (maps.ndim - 2))
        return torch.where(masks, token, maps)


def _takes(function: Callable[..., Any] | None, argument: str) -> bool:
    return function is not None and argument in inspect.signature(function).parameters


def _convolutions(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]


def _convolution(model: nn.Module, name: str) -> Any:
    """The convolution of this name."""
    if name not in _convolutions(model):
        raise ValueError(
            f"{type(model).__name__} has no convolution {name!r}: patch_embedding must be the name of the convolution "
            f"that embeds its patches, one of {_convolutions(model)}"
        )
    return model.get_submodule(name)
