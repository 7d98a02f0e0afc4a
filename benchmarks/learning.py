"""Features that DINO and DINO + iBOT + KoLeo learn in the same time, on images that this script makes.

    OMP_NUM_THREADS=1 python benchmarks/learning.py            # the table in docs/benchmarks.md, 20 minutes
    OMP_NUM_THREADS=1 python benchmarks/learning.py --minutes 1 --seeds 0

Each image shows one of 4 shapes with one of 4 textures; training uses no labels. Both methods train the same small ViT
from scratch, with the same views, batches and optimizer. Nearest neighbours then classify the teacher's features of
images of other seeds: class tokens by shape and texture, and patch tokens by the label of most of their pixels.

Each method takes as many steps as fit into the time of a run, by a few measured steps of both methods in interleaved
rounds. All times are CPU time, because other programs on the machine change the wall time.

Sizes: N images, P patches.
"""

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import Dinov2Config, Dinov2Model

from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss
from dino_head.callbacks import FreezeLastLayerCallback, TeacherUpdateCallback
from dino_head.examples.dino_module import DINO
from dino_head.examples.dinov2_module import DINOv2
from dino_head.metrics import KNNAccuracy
from dino_head.vision import TokenFeatures

SIZE, LOCAL_SIZE, PATCH = 96, 48, 16
SHAPES = ("disc", "square", "triangle", "ring")
TEXTURES = ("upright stripes", "level stripes", "checks", "dots")
CLASSES = tuple(f"{shape} of {texture}" for shape in SHAPES for texture in TEXTURES)
PIXEL_LABELS = ("background", *CLASSES)
METHODS = ("DINO", "DINO + iBOT + KoLeo")
SETTINGS: dict[str, Any] = {
    "width": 64,
    "depth": 3,
    "prototypes": 64,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "momentum": 0.96,
    "teacher_temp": 0.04,  # of class tokens and patches
    "clip": 1.0,  # of all gradients together
}


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, 96, 96) with a mean of 0.5, their classes (N,), and the labels of all pixels (N, 96, 96).

    The labels are indices of PIXEL_LABELS. Position, size and rotation of the shape, rotation, period, phase and
    contrast of its texture, and light and background are random.
    """
    random = torch.Generator().manual_seed(seed)
    parts = [_make(min(500, count - start), random) for start in range(0, count, 500)]  # to limit the memory
    images, classes, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return images, classes, labels


def _make(count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=random)

    classes = torch.randint(len(CLASSES), (count,), generator=random)
    texture = classes % len(TEXTURES)
    y, x = torch.meshgrid(*[torch.arange(SIZE) - (SIZE - 1) / 2] * 2, indexing="ij")
    radius = uniform(0.27, 0.42) * SIZE
    reach = SIZE / 2 - radius
    u, v = rotated(x - reach * uniform(-1, 1), y - reach * uniform(-1, 1), uniform(-0.5, 0.5))
    inside = pick(within(u / radius, v / radius), classes // len(TEXTURES))
    period = uniform(0.8, 1.25)
    a, b = rotated(x / period, y / period, uniform(-0.3, 0.3))
    pattern = pick(patterns(a + uniform(0, 10), b + uniform(0, 10)), texture)
    clouds = F.interpolate(0.25 * torch.randn(count, 1, 4, 4, generator=random), SIZE, mode="bicubic")[:, 0]
    fill = uniform(-0.1, 0.1) + uniform(0.25, 0.4) * pattern
    noise = 0.03 * torch.randn(count, SIZE, SIZE, generator=random)
    labels = torch.where(inside, 1 + classes[:, None, None], 0)
    return (0.5 + clouds + torch.where(inside, fill, 0.0) + noise)[:, None], classes, labels


def rotated(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates, rotated by an angle."""
    return angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x


def within(u: Tensor, v: Tensor) -> list[Tensor]:
    """Whether points are inside each of the SHAPES, which fit into the unit circle."""
    distance = (u.square() + v.square()).sqrt()
    corner = torch.stack([v, -v / 2 + 0.75**0.5 * u, -v / 2 - 0.75**0.5 * u]).amax(dim=0)
    return [distance < 0.9, torch.maximum(u.abs(), v.abs()) < 0.7, corner < 0.5, (distance > 0.5) & (distance < 1)]


def patterns(a: Tensor, b: Tensor) -> list[Tensor]:
    """Values of each of the TEXTURES, in (-1, 1)."""
    across, down = ((2 * math.pi / 10 * axis).sin() for axis in (a, b))  # a period of 10 pixels
    dots = across + down - 0.7
    return [(3 * wave).tanh() for wave in (across, down, 2 * across * down, dots)]


def pick(choices: list[Tensor], index: Tensor) -> Tensor:
    """For each image, the values (H, W) of the choice with its index; choices (N, H, W), index (N,)."""
    return torch.stack([choice.broadcast_to(choices[0].shape) for choice in choices])[index, torch.arange(len(index))]


def patch_labels(labels: Tensor) -> Tensor:
    """Labels of pixels (N, 96, 96) -> the most frequent label of each patch (N, P)."""
    counts = F.one_hot(labels, len(PIXEL_LABELS)).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(counts, PATCH).argmax(dim=1).flatten(1)


def views(images: Tensor) -> list[Tensor]:
    """2 global and 4 local views: crops, rotated and mirrored, with other contrast, noise and background."""
    sizes = [(SIZE, (0.6, 1.0))] * 2 + [(LOCAL_SIZE, (0.25, 0.5))] * 4
    return [view(images, size, scale) for size, scale in sizes]


def view(images: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
    """One view (N, 1, size, size) of each image, a crop of this share of its area."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), 1, 1)

    side = uniform(*scale).sqrt()
    x_axis, y_axis = torch.eye(2)
    rows = torch.cat(rotated(x_axis, y_axis, uniform(-0.3, 0.3)), dim=1)  # (N, 2, 2)
    rows[:, 1:] *= 2 * (uniform(0, 1) < 0.5) - 1
    shift = (1 - side) * torch.cat([uniform(-1, 1), uniform(-1, 1)], dim=1)
    grid = F.affine_grid(torch.cat([side * rows, shift], dim=2), [len(images), 1, size, size], align_corners=False)
    crop = F.grid_sample(images - 0.5, grid, padding_mode="reflection", align_corners=False)
    clouds = F.interpolate(0.15 * torch.randn(len(images), 1, 3, 3), size, mode="bilinear")
    return scaled(uniform(0.7, 1.4)[..., None] * crop + clouds + 0.03 * torch.randn_like(crop))


def scaled(images: Tensor) -> Tensor:
    """Values of images minus 0.5 -> inputs of the network, with a standard deviation of about 1."""
    return 4 * images


class Stem(nn.Sequential):
    """Embeds patches: filters, ReLU, the mean over the patch, and a linear map.

    It replaces the usual linear map, whose outputs depend on the phase of a texture: too much to learn in few steps.
    """

    def __init__(self, width: int) -> None:
        filters = nn.Conv2d(1, width, 8, stride=4, padding=2)
        nn.init.normal_(filters.weight, std=0.1)
        with torch.no_grad():
            filters.weight -= filters.weight.mean(dim=(2, 3), keepdim=True)  # independent of light
        super().__init__(filters, nn.ReLU(), nn.AvgPool2d(PATCH // 4), nn.Conv2d(width, width, 1))

    @property
    def weight(self) -> Tensor:
        """The model reads its dtype."""
        filters: Any = self[0]
        weight: Tensor = filters.weight
        return weight


def build(method: str, seed: int) -> LightningModule:
    """One of the methods; the seed determines weights and views."""
    seed_everything(seed, verbose=False)
    width, prototypes = SETTINGS["width"], SETTINGS["prototypes"]
    config = Dinov2Config(
        image_size=SIZE,
        patch_size=PATCH,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=SETTINGS["depth"],
        num_attention_heads=width // 32,
        initializer_range=0.1,  # with the usual 0.02, the head's outputs have a cosine of 0.92 between images
    )
    model = Dinov2Model(config)
    model.embeddings.patch_embeddings.projection = Stem(width)
    backbone = TokenFeatures(model)
    heads = [DINOProjectionHead(width, 256, 64, prototypes, batch_norm=False, freeze_last_layer=1) for _ in range(2)]
    objective: Any = {
        "warmup_teacher_temp_epochs": 0,
        "teacher_temp": SETTINGS["teacher_temp"],
        "centering": "sinkhorn",
    }
    loss = DINOLoss(prototypes, **objective)
    training: Any = {"learning_rate": SETTINGS["learning_rate"], "warmup_epochs": 1, "seed": seed}
    if method == "DINO":
        return DINO(backbone, heads[0], loss, views, **training)
    return DINOv2(
        backbone,
        heads[0],
        loss,
        IBOTPatchLoss(prototypes, **objective),
        views,
        patch_head=heads[1],
        layer_decay=1.0,  # rates and clipping as for DINO
        patch_embed_lr_mult=1.0,
        clip=math.inf,
        **training,
    )


def fit(model: LightningModule, images: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Train for some optimizer steps; returns wall time and CPU time in seconds."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(images), SETTINGS["batch_size"], shuffle=True, drop_last=True, generator=order)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=SETTINGS["clip"],
        callbacks=[FreezeLastLayerCallback(), TeacherUpdateCallback(base_momentum=SETTINGS["momentum"])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter(), time.process_time()
    trainer.fit(model, loader)
    return {"wall_seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}


class Probe:
    """Held-out images and their patches, to be classified by 20 nearest neighbours.

    The patches are a sample with the same number of each of the 17 labels.

    Args:
        count: Number of images that vote, and number of images to classify.
        seed: Seed of the images that vote; the others have the next one.
    """

    def __init__(self, count: int, seed: int = 2_000_000) -> None:
        self.sides = []
        for side in range(2):
            images, classes, labels = make_images(count, seed + side)
            of_patches = torch.cat([patch_labels(part) for part in labels.split(250)])  # to limit the memory
            self.sides.append((images, classes, of_patches, self._balanced(of_patches.flatten(), seed + side)))

    @staticmethod
    def _balanced(labels: Tensor, seed: int) -> Tensor:
        """Indices of patches, the same number of each label."""
        random = torch.Generator().manual_seed(seed)
        indices = [(labels == label).nonzero().squeeze(1) for label in range(len(PIXEL_LABELS))]
        least = min(500, *map(len, indices))
        return torch.cat([index[torch.randperm(len(index), generator=random)[:least]] for index in indices])

    @torch.no_grad()
    def accuracy(self, features: Any) -> dict[str, float]:
        """Accuracies in percent of a function that maps images to features (N, D) and features of patches (N, P, D)."""
        rows = []
        for images, classes, labels, chosen in self.sides:
            tokens, patches = (torch.cat(parts) for parts in zip(*map(features, images.split(250)), strict=True))
            rows.append([(tokens, classes), (patches.flatten(0, 1)[chosen], labels.flatten()[chosen])])
        found = {}
        for name, voters, tested in zip(("cls", "patch"), *rows, strict=True):
            metric = KNNAccuracy(*voters)
            metric.update(*tested)
            found[name] = 100 * metric.compute().item()
        return found


def pixels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of images and of their patches as features, the latter without their mean, which is light."""
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)  # (N, P, 256)
    return (images - 0.5).flatten(1), patches - patches.mean(dim=2, keepdim=True)


def of_teacher(model: Any) -> Any:
    """A function that maps images to features of the teacher."""
    backbone = model.teacher["backbone"].eval()
    return lambda images: backbone(scaled(images - 0.5))


def steps_in(seconds: float, images: Tensor, rounds: int = 3) -> dict[str, int]:
    """Number of steps of each method in this CPU time, from the medians of interleaved rounds."""
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method, times in found.items():
            one, seven = (fit(build(method, 0), images, steps, 0)["cpu_seconds"] for steps in (1, 7))
            times.append((seven - one) / 6)  # without work that is done once per run
    return {method: max(1, round(seconds / statistics.median(times))) for method, times in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| | seed | steps | CPU, s | kNN of class tokens, % | kNN of patch tokens, % |", "|---" * 6 + "|"]
    for row in rows:
        known = [f"{row[name]:,.0f}" if name in row else "" for name in ("seed", "steps", "cpu_seconds")]
        lines.append(" | ".join([f"| {row['what']}", *known, f"{row['cls']:.1f}", f"{row['patch']:.1f} |"]))
    return "\n".join(lines)


def main() -> None:
    """Train both methods with each seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="CPU time of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of weights, views and order")
    parser.add_argument("--images", type=int, default=2048, help="images to train on (%(default)s)")
    parser.add_argument("--held-out", type=int, default=3000, help="images that vote, and images to classify")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, probe = make_images(args.images, 0)[0], Probe(args.held_out)
    rows: list[dict[str, Any]] = [{"what": "pixels", **probe.accuracy(pixels)}]
    for seed in args.seeds:
        untrained = probe.accuracy(of_teacher(build("DINO", seed)))
        rows.append({"what": "untrained", "seed": seed, "steps": 0, **untrained})
    steps = steps_in(60 * args.minutes, images)
    for seed in args.seeds:
        for method in METHODS:
            model = build(method, seed)
            times = fit(model, images, steps[method], seed)
            accuracy = probe.accuracy(of_teacher(model))
            rows.append({"what": method, "seed": seed, "steps": steps[method], **times, **accuracy})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if args.json:
        settings = {"settings": SETTINGS, "torch": torch.__version__, "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({**settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
