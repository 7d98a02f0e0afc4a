"""DINO on a folder of images: a vision transformer, the published views, on whatever GPUs there are.

    python examples/fit_images.py --data photos                # any tree of image files; writes to runs/images
    python examples/fit_images.py --resume                     # goes on after Ctrl-C, a crash or a full disk
    python examples/fit_images.py --data NAME --stream 1000    # of a large data set on the Hub, nothing is kept

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
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ScheduleCallback,
    TeacherUpdateCallback,
)
from dino_head.cli.run_folder import StopAtBatchEnd, WholeCheckpoints, check_same_data, checkpoints, parse_run
from dino_head.examples.dino_module import DINO
from dino_head.vision.augment import dino_views
from dino_head.vision.backbones import VIT, check_backbone, vit
from dino_head.vision.data_wait import DataWait
from dino_head.vision.image_data import ImageData, StreamData


def pixels(text: str) -> int:
    """The size of a view."""
    if int(text) < 16 or int(text) % 16:
        raise argparse.ArgumentTypeError(f"must be a multiple of 16, the size of the ViT's patches, got {text}")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The options; a resumed run takes up those that it was started with."""
    parser = argparse.ArgumentParser(description="Train DINO on images, without labels.")
    parser.add_argument(
        "--data", required="--resume" not in (arguments or sys.argv), help="folder of images, or a name on the Hub"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/images"), help="folder of the run (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    parser.add_argument(
        "--stream",
        type=int,
        default=0,
        metavar="STEPS",
        help="read the images as they come, for what does not fit on the disk; an epoch is so many steps",
    )
    parser.add_argument("--epochs", type=int, default=100, help="passes over the images (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step on each GPU (%(default)s)")
    parser.add_argument("--size", default="small", choices=[*VIT], help="of the ViT (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=65536, help="width of the head's output (%(default)s)")
    parser.add_argument("--global-size", type=pixels, default=224, help="pixels of the global views (%(default)s)")
    parser.add_argument("--local-size", type=pixels, default=96, help="pixels of the local views (%(default)s)")
    parser.add_argument(
        "--momentum", type=float, default=0.996, help="of the teacher, in the beginning; it ends at 1 (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=4, help="processes that decode images (%(default)s)")
    parser.add_argument("--precision", default="32-true", help="of the Trainer; bf16-mixed on newer GPUs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    limits = {
        "momentum": (0.0, 1.0),
        "stream": (0, math.inf),
        "epochs": (1, math.inf),
        "batch_size": (2, math.inf),
        "prototypes": (2, math.inf),
        "workers": (0, math.inf),
        "seed": (0, math.inf),
    }
    return parse_run(parser, limits, arguments)


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
    decoded_size = args.global_size * 8 // 7
    data: ImageData | StreamData
    if args.stream:
        data = StreamData(args.data, args.batch_size, args.workers, decoded_size, args.seed)
    else:
        data = ImageData(args.data, args.batch_size, args.workers, decoded_size, args.global_size, args.seed)
    check_same_data(args.out, data.description, args.resume)
    wait = DataWait()
    callbacks = [
        FreezeLastLayerCallback(),
        TeacherUpdateCallback(base_momentum=args.momentum),
        ScheduleCallback("weight_decay", (0.04, 0.4)),
        CollapseMonitorCallback(every_n_steps=10),
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
        plugins=[WholeCheckpoints()],
        logger=CSVLogger(args.out, name="metrics"),
        limit_train_batches=args.stream or 1.0,
        default_root_dir=args.out,  # where bad files are listed
    )
    model = build(args, trainer.world_size)
    with torch.random.fork_rng():
        views = model.augment(torch.zeros(2, 3, args.global_size, args.global_size, dtype=torch.uint8))
    check_backbone(model.student["backbone"], model.student["head"], views)  # type: ignore[arg-type]
    try:
        trainer.fit(model, data, ckpt_path=checkpoints(args.out)[-1] if args.resume else None)
    except OSError as error:
        raise SystemExit(f"stopped: {error}. Make room or repair, and go on with --resume --out {args.out}") from error
    bad = len(data.bad_files.names())
    summary = {"images": data.description, "bad_files": bad, "data_wait": wait.share, "epochs": trainer.current_epoch}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
