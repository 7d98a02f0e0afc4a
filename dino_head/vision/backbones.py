"""Backbones: any module that maps images (B, C, H, W), of each view's size, to features (B, D). Here: Transformers.

Features(Dinov2Model(config), class_token)                                  # transformers, randomly initialised
Features(ConvNextModel.from_pretrained(name), pooled)                       # transformers, trained
timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
nn.Sequential(monai.networks.nets.DenseNet121(3, 1, 128).features, nn.AdaptiveAvgPool3d(1), nn.Flatten())
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from dino_head import DINOProjectionHead

VIT = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def class_token(output: Any) -> Tensor:
    """The first of a transformer's tokens (B, N, D) -> (B, D)."""
    tokens: Tensor = output.last_hidden_state
    return tokens[:, 0]


def pooled(output: Any) -> Tensor:
    """The mean over a map of features, as the model gives it, (B, D)."""
    features: Tensor = output.pooler_output
    return features.flatten(1)


class Features(nn.Module):
    """A model of Hugging Face Transformers that gives features.

    Args:
        model: takes images (B, C, H, W).
        pick: what it returns -> features (B, D).
        options: of its forward, such as interpolate_pos_encoding=True.
    """

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor], **options: Any) -> None:
        super().__init__()
        self.model, self.pick, self.options = model, pick, options

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> features (B, D)."""
        return self.pick(self.model(images, **self.options))


def vit(
    size: str = "small",
    patch_size: int = 16,
    image_size: int = 224,
    channels: int = 3,
    width: int | None = None,
    depth: int | None = None,
) -> Features:
    """A vision transformer, randomly initialised, whose position embeddings are interpolated for local views.

    Args:
        size: The name of its size: "tiny" (192 features), "small" (384), "base" (768) or "large" (1024).
        patch_size: The height and width of a patch; those of the views are its multiples.
        image_size: The height and width of the global views.
        channels: The number C of channels of the images.
        width: The number of features, if it is not that of the size; a multiple of 64.
        depth: The number of layers, if it is not that of the size.
    """
    features, layers, heads = VIT[size]
    features = width or features
    config = ViTConfig(
        hidden_size=features,
        num_hidden_layers=depth or layers,
        num_attention_heads=features // 64 if width else heads,
        intermediate_size=4 * features,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=channels,
        layer_norm_eps=1e-6,
    )
    return Features(ViTModel(config, add_pooling_layer=False), class_token, interpolate_pos_encoding=True)


@torch.no_grad()
def check_backbone(backbone: nn.Module, head: DINOProjectionHead, views: Sequence[Tensor]) -> None:
    """Raise ValueError, before training starts, if the backbone cannot take the views, or the head its features.

    Args:
        backbone: goes through in evaluation mode, and is left as it was.
        head: what the features are for.
        views: (B, C, H, W); one of each size is tried.
    """
    modes = {module: module.training for module in backbone.modules()}
    for size, view in {view.shape[2:]: view for view in views}.items():
        shape = " x ".join(map(str, size))
        try:
            features = backbone.eval()(view)
        except Exception as error:  # whatever a backbone says
            raise ValueError(
                f"the backbone cannot take views of {shape} ({type(error).__name__}: {error}): make them a multiple of "
                "its patches, and let it interpolate its position embeddings (transformers: interpolate_pos_encoding="
                "True; timm: dynamic_img_size=True)"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not isinstance(features, Tensor):
            raise ValueError(
                f"the backbone returns a {type(features).__name__}, expected a tensor of features (B, D): pick one of "
                "what it returns, Features(model, class_token)"
            )
        if features.ndim != 2 or len(features) != len(view):
            raise ValueError(
                f"the backbone makes {tuple(features.shape)} of {len(view)} views of {shape}, expected (B, D): of "
                "tokens (B, N, D) take the first or the mean, of maps (B, D, h, w) the mean"
            )
        if features.shape[1] != head.input_dim:
            raise ValueError(
                f"the backbone makes {features.shape[1]} features, and the head takes {head.input_dim}: "
                f"DINOProjectionHead(input_dim={features.shape[1]}, ...)"
            )
