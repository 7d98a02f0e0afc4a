"""Backbones: modules that map images (B, C, H, W) of each view's size to features (B, D).

Features(Dinov2Model(config), class_token)                                  # transformers, randomly initialised
Features(ConvNextModel.from_pretrained(name), pooled)                       # transformers, pretrained
timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
nn.Sequential(monai.networks.nets.DenseNet121(3, 1, 128).features, nn.AdaptiveAvgPool3d(1), nn.Flatten())
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_head import DINOLoss, DINOProjectionHead, FactoredLogits
from dino_head._extras import packages_of_extras
from dino_head._pooling import how_to_pool

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


@torch.no_grad()
def check_backbone(
    backbone: nn.Module, head: DINOProjectionHead, views: Sequence[Tensor], loss: DINOLoss | None = None
) -> None:
    """Raise an error before training starts if backbone, head and loss do not fit the views and each other.

    All of them are called in evaluation mode; neither they nor random states change. Call it under the autocast of the
    run, with views in the dtype of the weights.

    Args:
        backbone: Backbone for the views.
        head: Projection head for the features.
        views: Views (B, C, H, W); one of each size is passed on.
        loss: Loss for the outputs of the head; None to check only backbone and head. With Sinkhorn, all processes have
            to call it.

    Raises:
        ValueError: If one of them raises an error, or the backbone's output is not (B, head.input_dim).
    """
    parts = [part for part in (backbone, head, loss) if part is not None]
    modes = {module: module.training for part in parts for module in part.modules()}
    try:
        for part in parts:
            part.eval()
        with torch.random.fork_rng(sorted({view.get_device() for view in views if view.is_cuda})):
            for view in {view.shape[2:]: view for view in views}.values():
                _check_view(backbone, head, view, loss)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_view(backbone: nn.Module, head: DINOProjectionHead, view: Tensor, loss: DINOLoss | None) -> None:
    shape = " x ".join(map(str, view.shape[2:]))
    try:
        features = backbone(view)
    except Exception as error:  # of any kind
        raise ValueError(
            f"the backbone cannot take views of {shape} ({type(error).__name__}: {error}): make their size a "
            "multiple of its patch size, let it interpolate its position embeddings (transformers: "
            "interpolate_pos_encoding=True; timm: dynamic_img_size=True), and convert them from "
            f"{view.dtype} to the type of its weights, if it differs"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(view):
        raise ValueError(
            f"the backbone must return features ({len(view)}, D) for {len(view)} views of {shape}, got "
            f"{how_to_pool(features)}"
        )
    if features.shape[1] != head.input_dim:
        raise ValueError(
            f"the backbone returns {features.shape[1]} features, but the head expects {head.input_dim}: use "
            f"DINOProjectionHead(input_dim={features.shape[1]}, ...)"
        )
    try:
        z, prototypes = head.factored_logits(features)
    except RuntimeError as error:
        raise ValueError(
            f"the head cannot take the backbone's features {tuple(features.shape)} in {features.dtype} "
            f"({type(error).__name__}: {error}): convert backbone and head to one type"
        ) from error
    if loss is not None:
        two_views = FactoredLogits(torch.stack([z, z]), prototypes)
        loss.forward(two_views, two_views)  # without hooks, which measure the calls during training
