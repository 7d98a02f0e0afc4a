"""Images and volumes: reading, datamodules, augmentation, backbones and loaders that resume.

Each name is imported on first use, with only the packages that it needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dino_head._extras import packages_of_extras

if TYPE_CHECKING:
    from dino_head.vision.augment import dino_views
    from dino_head.vision.backbones import Features, vit
    from dino_head.vision.checks import check_backbone
    from dino_head.vision.image_data import ImageData, StreamData
    from dino_head.vision.loaders import ResumableLoader
    from dino_head.vision.reading import read_image
    from dino_head.vision.token_features import TokenFeatures
    from dino_head.vision.volume_data import VolumeData
    from dino_head.vision.volumes import read_volume

_MODULES = {
    "Features": "backbones",
    "ImageData": "image_data",
    "ResumableLoader": "loaders",
    "StreamData": "image_data",
    "TokenFeatures": "token_features",
    "VolumeData": "volume_data",
    "check_backbone": "checks",
    "dino_views": "augment",
    "read_image": "reading",
    "read_volume": "volumes",
    "vit": "backbones",
}

__all__ = [
    "Features",
    "ImageData",
    "ResumableLoader",
    "StreamData",
    "TokenFeatures",
    "VolumeData",
    "check_backbone",
    "dino_views",
    "read_image",
    "read_volume",
    "vit",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with packages_of_extras(f"{__name__}.{name}"):
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
