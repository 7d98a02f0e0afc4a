"""DINO on a folder of images: a vision transformer and the published views, on all GPUs of the machine.

    python examples/fit_images.py --data photos                # any tree of image files; writes to runs/images
    python examples/fit_images.py --resume                     # resumes the run after Ctrl-C, a crash or a full disk
    python examples/fit_images.py --data NAME --stream 1000    # streams a large data set from the Hub, stores nothing

The script runs `dino-head fit --config images`, with all of its flags, but computes the learning rate and the warm-up
from the batch size and the number of epochs.

If the folders are classes, they are labels only for the kNN accuracy, for which every tenth image is held out. Files
that cannot be decoded are skipped, counted, and listed in bad_files.txt.
"""

import argparse
from collections.abc import Sequence

from lightning.pytorch import Trainer

from dino_head.cli.fit import main as fit
from dino_head.cli.fit import with_recipe


def linear_rule(flags: argparse.Namespace) -> list[str]:
    """The learning rate by the linear rule (Goyal et al. 2017), 5e-4 for 256 images per step, and the warm-up."""
    batch_size, epochs = flags.batch_size or 64, flags.epochs or 100  # the recipe's
    processes = Trainer(devices=flags.devices or "auto", logger=False, enable_checkpointing=False).world_size
    warmup_epochs = min(10, epochs // 10)
    return ["--learning-rate", str(5e-4 * batch_size * processes / 256), f"--model.warmup_epochs={warmup_epochs}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with the recipe."""
    fit(with_recipe("images", arguments, linear_rule))


if __name__ == "__main__":
    main()
