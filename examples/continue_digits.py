"""Continued pre-training: train the model of the digits further, on dusty images.

    python examples/fit_digits.py                 # writes runs/digits/checkpoints/last.ckpt
    python examples/continue_digits.py            # continues from it, writes to runs/continued

Backbone, head and center come from the checkpoint's teacher. For the first steps, only the head, which may be a new
one, is trained. The run ends early if the features become worse than at the start.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import FreezeLastLayerCallback, KNNProbeCallback, TeacherUpdateCallback
from dino_head.checkpoints import load_head
from dino_head.cli.run_folder import check_readable
from dino_head.examples.dino_module import DINO
from dino_head.examples.fit_digits import Digits, Labelled, conv_net, digit_views, digits
from dino_head.metrics import KNNAccuracy


class DustyDigits(Digits):
    """The same images and labels with dust: 15% of the pixels are random, always the same ones."""

    def labelled(self) -> tuple[Labelled, Labelled]:
        """Training and held-out images."""
        random = torch.Generator().manual_seed(0)

        def dusty(images: Tensor) -> Tensor:
            dust, grey = (torch.rand(images.shape, generator=random) for _ in range(2))
            return torch.where(dust < 0.15, grey, images)

        (train, labels), (test, test_labels) = digits()
        return (dusty(train), labels), (dusty(test), test_labels)


def below(path: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the submodule `path`, from the state dict of the whole module."""
    return {key.removeprefix(f"{path}."): value for key, value in state.items() if key.startswith(f"{path}.")}


def build(checkpoint: Path, prototypes: int | None = None, seed: int = 0) -> DINO:
    """The model of a checkpoint, with its head or with a new head of `prototypes` prototypes."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    backbone = conv_net()
    backbone.load_state_dict(below("teacher.backbone", state))
    head = load_head(state) if prototypes is None else DINOProjectionHead(128, 256, 64, prototypes)
    loss = DINOLoss(len(head.last_layer.weight), warmup_teacher_temp_epochs=0, teacher_temp=0.04)
    if prototypes is None:
        loss.load_state_dict(below("loss", state))  # the center belongs to the head
    return DINO(backbone, head, loss, digit_views(), learning_rate=1e-3, warmup_epochs=2, seed=seed)


@torch.no_grad()
def knn_top1(backbone: torch.nn.Module, data: Digits) -> float:
    """The same kNN accuracy as KNNProbeCallback's, before there is a Trainer."""
    (train, labels), (test, test_labels) = data.labelled()
    accuracy = KNNAccuracy(backbone.eval()(train), labels, k=10)
    accuracy.update(backbone(test), test_labels)
    return accuracy.compute().item()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description="Continues the pre-training of the digits' model on other images.")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/digits/checkpoints/last.ckpt"), help="to start from (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/continued"), help="folder of the run (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the 1,400 images (%(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=21, help="steps that train only the head (%(default)s)")
    parser.add_argument("--prototypes", type=int, help="number of prototypes of a new head (default: keep the head)")
    parser.add_argument("--seed", type=int, default=0, help="seed of order and augmentation (%(default)s)")
    args = parser.parse_args(arguments)
    for name, least in (("epochs", 1), ("warmup_steps", 0), ("prototypes", 2), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not args.checkpoint.exists():
        parser.error(
            f"{args.checkpoint} does not exist: run examples/fit_digits.py first, or set another with --checkpoint"
        )
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} is no empty folder: choose another with --out")
    try:
        check_readable(args.checkpoint)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write the backbone for use elsewhere."""
    args = parse(arguments)
    seed_everything(args.seed, workers=True, verbose=False)
    model, data = build(args.checkpoint, args.prototypes, args.seed), DustyDigits(seed=args.seed)
    start = knn_top1(model.teacher["backbone"], data)
    probe = KNNProbeCallback(k=10)
    best = ModelCheckpoint(args.out, filename="best", monitor="knn/top1", mode="max")
    chance = 2 * math.sqrt(start * (1 - start) / 397)  # two standard errors of a share of the held-out images
    # Stops only below the accuracy at the start, never for lack of improvement.
    stop = EarlyStopping("knn/top1", mode="max", patience=args.epochs, divergence_threshold=start - chance)
    warmup = FreezeLastLayerCallback(module="student.backbone", steps=args.warmup_steps)
    callbacks = [warmup, TeacherUpdateCallback(base_momentum=0.98), probe, stop, best]
    trainer = Trainer(max_epochs=args.epochs, gradient_clip_val=3.0, callbacks=callbacks, logger=False)
    trainer.fit(model.train(), data)

    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    backbone = below("teacher.backbone", state)
    torch.save(backbone, args.out / "backbone.pt")
    save_file(backbone, args.out / "backbone.safetensors")
    history = [round(entry["top1"], 4) for entry in probe.history]
    summary = {
        "knn_top1_before": round(start, 4),
        "knn_top1": history,
        "knn_top1_of_the_backbone_written": max(history),
        "fell_below_the_start": history[-1] < start - chance,
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
