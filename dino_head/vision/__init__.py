"""Images and volumes: reading, data modules, augmentation, backbones and loaders that resume.

Each name is imported when it is first used, together with the packages that it needs and no others.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_head.vision.augment import dino_views
    from dino_head.vision.backbones import Features, check_backbone, vit
    from dino_head.vision.image_data import ImageData, StreamData
    from dino_head.vision.loaders import ResumableLoader

_MODULES = {
    "Features": "backbones",
    "ImageData": "image_data",
    "ResumableLoader": "loaders",
    "StreamData": "image_data",
    "check_backbone": "backbones",
    "dino_views": "augment",
    "vit": "backbones",
}

__all__ = ["Features", "ImageData", "ResumableLoader", "StreamData", "check_backbone", "dino_views", "vit"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
