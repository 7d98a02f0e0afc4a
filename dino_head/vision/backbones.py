"""Backbones: modules that map images (B, C, H, W) of each view's size to features (B, D).

Features(Dinov2Model(config), class_token)                                  # transformers, randomly initialised
Features(ConvNextModel.from_pretrained(name), pooled)                       # transformers, pretrained
timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
nn.Sequential(monai.networks.nets.DenseNet121(3, 1, 128).features, nn.AdaptiveAvgPool3d(1), nn.Flatten())

A backbone for DINOv2 also returns patch tokens and takes masks. DINO, KNNProbeCallback and ReportCallback use its class
tokens as features. `TokenFeatures` wraps a transformer as such a backbone:

backbone(images, masks=None) -> (class tokens (B, D), patch tokens (B, N, D))
backbone.patch_size                      # a tuple with the size in pixels along each axis, such as (16, 16)

N is the number of patches, the product of the images' size // patch size, and varies with the images. They are in
row-major order. The masks, bool (B, N) on the images' device, are True where the mask token replaces the embedding of a
patch. `check_backbone` tests all of this.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dino_head._extras import packages_of_extras

VIT = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def class_token(output: Any) -> Tensor:
    """The class token (B, D): the first of the tokens (B, N, D) in a transformer's output."""
    tokens: Tensor = output.last_hidden_state
    return tokens[:, 0]


def pooled(output: Any) -> Tensor:
    """The pooled features (B, D) of a model's output, such as the mean of a convolutional network's feature map."""
    features: Tensor = output.pooler_output
    return features.flatten(1)


class Features(nn.Module):
    """A model of Hugging Face Transformers as a backbone, images (B, C, H, W) -> features (B, D).

    Args:
        model: Model whose input is images (B, C, H, W).
        pick: Function that maps the model's output to features (B, D), such as `class_token` or `pooled`.
        options: Options of the model's forward, such as interpolate_pos_encoding=True.
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
    """A randomly initialised vision transformer that interpolates its position embeddings for local views.

    Args:
        size: "tiny" (192 features), "small" (384), "base" (768) or "large" (1024).
        patch_size: Height and width of a patch in pixels. The height and width of every view must be multiples of it.
        image_size: Height and width of the global views in pixels.
        channels: Number C of channels of the images.
        width: Number of features, a multiple of 64. By default, `size` determines it.
        depth: Number of layers. By default, `size` determines it.
    """
    with packages_of_extras("dino_head.vision.vit"):
        from transformers import ViTConfig, ViTModel
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
