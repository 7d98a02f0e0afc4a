"""A folder of photos of two classes, one file of which is damaged."""

import numpy as np
from PIL import Image


def make_photos(root, classes=("light", "dark")):
    """Forty images of 40 x 40 pixels, and a text with the name of an image."""
    random = np.random.default_rng(0)
    for number in range(40):
        folder = root / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        low = 128 * (number % len(classes) == 0)
        Image.fromarray(random.integers(low, low + 127, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    (root / classes[0] / "text.jpg").write_text("no image")
    return root


QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
TINY_VIT = ["--global-size", "32", "--local-size", "16", "--prototypes", "64", "--workers", "0"]
TINY_VIT += ["--model.backbone.width=64", "--model.backbone.depth=2", "--model.head.input_dim=64", *QUIET]
