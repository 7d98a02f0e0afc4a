"""Mean and standard deviation of ImageNet, with which images are normalized for a backbone."""

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(image: Tensor) -> Tensor:
    """Bytes (3, H, W) -> float32 (3, H, W), normalized like the views of `dino_views`, without augmentation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image / 255 - mean) / std
