"""DINO on a folder of images: a vision transformer, the published views, on whatever GPUs there are.

    python examples/fit_images.py --data photos                # any tree of image files; writes to runs/images
    python examples/fit_images.py --data photos --resume       # goes on after Ctrl-C, a crash or a full disk

Where the folders are classes, they are the labels of the kNN accuracy, and of nothing else: every tenth image is held
out for it. Files that cannot be decoded are left out, counted, and listed in bad_files.txt.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from augment import dino_views
from backbones import VIT, check_backbone, vit
from data import DataWait, ResumableLoader, StreamLoader
from dino_module import DINO
from images import Images, Stream, fingerprint, normalized, open_images
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from run_folder import StopAtBatchEnd, checkpoints, parse_run
from torch.utils.data import DataLoader

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ScheduleCallback,
    TeacherUpdateCallback,
)


class ImageData(LightningDataModule):
    """Batches of bytes (B, 3, image_size, image_size), with labels where there are some.

    Args:
        data: a folder, or the name of a data set on the Hugging Face Hub.
        batch_size: images of one process.
        workers: processes that decode, beside each training process.
        image_size: to which images are scaled and cropped before they are augmented.
        eval_size: the same for the kNN accuracy.
        seed: of the order.
    """

    def __init__(
        self,
        data: str,
        batch_size: int = 64,
        workers: int = 2,
        image_size: int = 256,
        eval_size: int = 224,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rows = open_images(data)
        labels = self.rows.features.get("label")
        self.has_classes = labels is not None and labels.num_classes > 1
        held_out = set(range(0, len(self.rows), 10)) if self.has_classes else set()
        self.train = Images(self.rows.select([i for i in range(len(self.rows)) if i not in held_out]), image_size)
        self.held_out = Images(self.rows.select(sorted(held_out)), eval_size, normalized)
        self.voters = Images(self.train.rows, eval_size, normalized)
        self.batch_size, self.workers, self.seed = batch_size, workers, seed

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, anew in each epoch."""
        assert self.trainer is not None
        options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available()}
        return ResumableLoader(self.train, self.batch_size, self.trainer, self.seed, **options)

    def knn_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Training images that vote on the held-out ones."""
        voters, held_out = (
            DataLoader(images, batch_size=self.batch_size, num_workers=self.workers)
            for images in (self.voters, self.held_out)
        )
        return voters, held_out


class StreamData(LightningDataModule):
    """The same, read as it comes, without held-out images: an epoch is the Trainer's limit_train_batches.

    Args:
        data: a folder, or the name of a data set on the Hugging Face Hub.
        batch_size: images of one process.
        workers: processes that decode, beside each training process; no more than the data set has files.
        image_size: to which images are scaled and cropped before they are augmented.
        seed: of the order.
    """

    def __init__(self, data: str, batch_size: int = 64, workers: int = 2, image_size: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.rows = open_images(data, streaming=True)
        self.batch_size, self.workers, self.image_size, self.seed = batch_size, workers, image_size, seed

    def train_dataloader(self) -> StreamLoader:
        """Shuffled, anew in each epoch."""
        assert self.trainer is not None
        stream = Stream(self.rows, self.image_size, self.trainer.global_rank, self.trainer.world_size, self.seed)
        options = {"num_workers": self.workers, "pin_memory": torch.cuda.is_available(), "drop_last": True}
        return StreamLoader(stream, self.batch_size, self.trainer, **options)


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The options; a resumed run takes up those that it was started with."""
    parser = argparse.ArgumentParser(description="Train DINO on images, without labels.")
    parser.add_argument(
        "--data", required="--resume" not in (arguments or sys.argv), help="folder of images, or a name on the Hub"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/images"), help="folder of the run (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    parser.add_argument("--epochs", type=int, default=100, help="passes over the images (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step on each GPU (%(default)s)")
    parser.add_argument("--size", default="small", choices=[*VIT], help="of the ViT (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=65536, help="width of the head's output (%(default)s)")
    parser.add_argument("--global-size", type=int, default=224, help="pixels of the global views (%(default)s)")
    parser.add_argument("--local-size", type=int, default=96, help="pixels of the local views (%(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode images (%(default)s)")
    parser.add_argument("--precision", default="32-true", help="of the Trainer; bf16-mixed on newer GPUs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    least = {
        "epochs": 1,
        "batch_size": 2,
        "prototypes": 2,
        "global_size": 16,
        "local_size": 16,
        "workers": 0,
        "seed": 0,
    }
    return parse_run(parser, {name: (limit, math.inf) for name, limit in least.items()}, arguments)


def build(args: Any, world_size: int = 1) -> DINO:
    """The model, its learning rate by the linear rule (Goyal et al. 2017): 5e-4 for 256 images a step."""
    return DINO(
        vit(args.size, image_size=args.global_size),
        DINOProjectionHead(VIT[args.size][0], 2048, 256, args.prototypes, batch_norm=False, freeze_last_layer=1),
        DINOLoss(args.prototypes, warmup_teacher_temp_epochs=0, teacher_temp=0.04),
        dino_views(args.global_size, args.local_size),
        learning_rate=5e-4 * args.batch_size * world_size / 256,
        warmup_epochs=min(10, args.epochs // 10),
        clip_per_parameter=3.0,
        seed=args.seed,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and say what was left out."""
    args = parse(arguments)
    seed_everything(args.seed, workers=True, verbose=False)
    data = ImageData(args.data, args.batch_size, args.workers, args.global_size * 8 // 7, args.global_size, args.seed)
    images, listed = fingerprint(data.rows), args.out / "images.txt"
    if args.resume and listed.exists() and listed.read_text() != images:
        raise SystemExit(
            f"{args.data} has changed since the run began ({listed.read_text()}, now {images}), and the order of the "
            "images with it: put the files back, or begin another run with --out. Nothing was changed"
        )
    wait = DataWait()
    callbacks = [
        FreezeLastLayerCallback(),
        TeacherUpdateCallback(),
        ScheduleCallback("weight_decay", (0.04, 0.4)),
        CollapseMonitorCallback(),
        *([KNNProbeCallback(max_samples=10_000)] if data.has_classes else []),
        wait,
        # The new one is written before the old one is deleted, so that a full disk costs neither.
        ModelCheckpoint(args.out / "checkpoints", filename="{epoch}"),
        StopAtBatchEnd(args.out / "checkpoints" / "interrupted.ckpt"),
    ]
    trainer = Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        callbacks=callbacks,
        logger=CSVLogger(args.out, name="metrics"),
    )
    model = build(args, trainer.world_size)
    with torch.random.fork_rng():
        views = model.augment(torch.zeros(2, 3, args.global_size, args.global_size, dtype=torch.uint8))
    check_backbone(model.student["backbone"], model.student["head"], views)  # type: ignore[arg-type]
    listed.write_text(images)
    try:
        trainer.fit(model, data, ckpt_path=checkpoints(args.out)[-1] if args.resume else None)
    except OSError as error:
        raise SystemExit(f"stopped: {error}. Make room or repair, and go on with --resume --out {args.out}") from error
    finally:
        bad = sorted(data.train.bad_files() | data.voters.bad_files() | data.held_out.bad_files())
        file = args.out / f"bad_files{trainer.global_rank or ''}.txt"
        file.write_text("\n".join(bad))
        print(f"{len(bad)} of {len(data.rows)} images could not be decoded: {file}")
    summary = {"images": images, "bad_files": len(bad), "data_wait": wait.share, "epochs": trainer.current_epoch}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
