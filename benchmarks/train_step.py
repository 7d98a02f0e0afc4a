"""Time of a whole training step, beside the usual implementation with the same backbone, head and views.

    python benchmarks/train_step.py                                  # ViT-tiny, K = 65,536
    python benchmarks/train_step.py --device cuda --size small --batch 64 --precision bf16

The usual way: a forward for each view, logits in memory, a loop over pairs of views, and a Python loop over the
parameters for the teacher's average. Both use two global views of 224 and eight local ones of 96 pixels, and AdamW.
The backbone alone, a forward and backward of all views, is timed as well. Steps are interleaved; times are medians.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss, multicrop_forward
from dino_head.examples.dino_module import DINO
from dino_head.examples.dinov2_module import DINOv2
from dino_head.vision import TokenFeatures
from dino_head.vision.backbones import VIT, vit

MOMENTUM = 0.996
TEMPERATURE: dict[str, Any] = {"warmup_teacher_temp_epochs": 0, "teacher_temp": 0.04}


class Usual:
    """The usual implementation."""

    def __init__(self, student: nn.ModuleDict, output_dim: int) -> None:
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.center = torch.zeros(1, output_dim, device=next(student.parameters()).device)

    def loss(self, views: list[Tensor]) -> Tensor:
        """One forward per view, and all logits in memory."""
        student = [self.student["head"](self.student["backbone"](view)) / 0.1 for view in views]
        with torch.no_grad():
            logits = [self.teacher["head"](self.teacher["backbone"](view)) for view in views[:2]]
            targets = [F.softmax((teacher - self.center) / 0.04, dim=-1) for teacher in logits]
            batch_center = torch.cat(logits).mean(dim=0, keepdim=True)
            self.center = self.center * 0.9 + batch_center * 0.1
        losses = [
            torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1).mean()
            for t, target in enumerate(targets)
            for s, view in enumerate(student)
            if s != t
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def follow(self) -> None:
        """The teacher's average."""
        for student, teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            teacher.data.mul_(MOMENTUM).add_((1 - MOMENTUM) * student.detach().data)


class Ours:
    """The example's module; `follow` does the same as TeacherUpdateCallback."""

    def __init__(self, student: nn.ModuleDict, output_dim: int) -> None:
        self.module = self.make_module(student["backbone"], student["head"], output_dim)
        self.module.to(next(student.parameters()).device)
        self.student = self.module.student
        self.students = [parameter.detach() for parameter in self.student.parameters()]
        self.teachers = [parameter.detach() for parameter in self.module.teacher.parameters()]

    def make_module(self, backbone: Any, head: Any, output_dim: int) -> Any:
        """DINO as a LightningModule."""
        return DINO(backbone, head, DINOLoss(output_dim, **TEMPERATURE), augment=lambda images: [images])

    def loss(self, views: list[Tensor]) -> Tensor:
        """One forward per resolution, without logits in memory."""
        student = self.module.outputs(self.module.student, views)
        with torch.no_grad():
            teacher = self.module.outputs(self.module.teacher, views[:2])
        loss: Tensor = self.module.loss(teacher, student)
        return loss

    @torch.no_grad()
    def follow(self) -> None:
        """The teacher's average."""
        torch._foreach_lerp_(self.teachers, self.students, 1 - MOMENTUM)


class OursOfDINOv2(Ours):
    """DINOv2 with the same backbone, and one head for class tokens and masked patches."""

    def make_module(self, backbone: Any, head: Any, output_dim: int) -> Any:
        """DINOv2 as a LightningModule, without a Trainer that would log its losses."""
        convolution = "embeddings.patch_embeddings.projection"
        tokens = TokenFeatures(backbone.model, convolution, class_and_patch_tokens, interpolate_pos_encoding=True)
        losses = DINOLoss(output_dim, **TEMPERATURE), IBOTPatchLoss(output_dim, **TEMPERATURE)
        module: Any = DINOv2(tokens, head, *losses, augment=lambda images: [images])
        module.log = module.log_dict = lambda *_, **__: None
        return module

    def loss(self, views: list[Tensor]) -> Tensor:
        """The module's own step on these views, which masks half of the global ones."""
        self.module.augment = lambda _: views
        loss: Tensor = self.module.training_step(views[0], 0)
        return loss


def class_and_patch_tokens(output: Any) -> tuple[Tensor, Tensor]:
    """Class tokens (B, D) and patch tokens (B, N, D) of a transformer's output."""
    return output.last_hidden_state[:, 0], output.last_hidden_state[:, 1:]


def make(
    size: str,
    batch: int,
    prototypes: int,
    scale: float,
    device: torch.device,
    *,
    depth: int | None = None,
    hidden_dim: int = 2048,
) -> tuple[nn.ModuleDict, list[Tensor]]:
    """Backbone and head of a student, and two global and eight local views."""
    torch.manual_seed(0)
    sides = [round(side * scale / 16) * 16 for side in (224, 96)]
    head = DINOProjectionHead(VIT[size][0], hidden_dim, 256, prototypes, batch_norm=False)
    student = nn.ModuleDict({"backbone": vit(size, image_size=sides[0], depth=depth), "head": head}).to(device)
    views = [torch.randn(batch, 3, side, side, device=device) for side in [sides[0]] * 2 + [sides[1]] * 8]
    return student, views


def step(way: Usual | Ours, optimizer: torch.optim.Optimizer, views: list[Tensor], *, bf16: bool) -> Tensor:
    """Loss, backward, optimizer step and teacher update; bf16 uses autocast."""
    with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16):
        loss = way.loss(views)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    way.follow()
    return loss.detach()


def main() -> None:
    """Print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", choices=[*VIT], default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--scale", type=float, default=1.0, help="scale of the views' sides")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="bf16 uses autocast")
    args = parser.parse_args()
    device, bf16 = torch.device(args.device), args.precision == "bf16"
    student, views = make(args.size, args.batch, args.prototypes, args.scale, device)
    ways: dict[str, Usual | Ours] = {
        "usual": Usual(copy.deepcopy(student), args.prototypes),
        "ours": Ours(student, args.prototypes),
    }
    optimizers = {name: torch.optim.AdamW(way.student.parameters(), lr=1e-5) for name, way in ways.items()}

    def step_of(name: str) -> float:
        return step(ways[name], optimizers[name], views, bf16=bf16).item()

    alone = copy.deepcopy(student["backbone"])

    def backbone_alone() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                multicrop_forward(alone, views[:2])
            features = multicrop_forward(alone, views)
        features.sum().backward()
        alone.zero_grad()
        return 0.0

    work: dict[str, Callable[[], float]] = {"usual": lambda: step_of("usual"), "ours": lambda: step_of("ours")}
    first = [run() for run in work.values()]
    if abs(first[0] - first[1]) > (1e-4 if args.precision == "32" else 0.05) * first[0]:
        raise SystemExit(f"the two ways differ: the losses of the first step are {first}")
    work["backbone"] = backbone_alone
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(u / o for u, o in zip(seconds["usual"], seconds["ours"], strict=True))
    rest = statistics.median(1 - b / o for b, o in zip(seconds["backbone"], seconds["ours"], strict=True))
    medians = ", ".join(f"{name} {statistics.median(times):.3f} s" for name, times in seconds.items())
    print(f"ViT-{args.size}, batch {args.batch}, K = {args.prototypes:,}, {args.rounds} rounds: {medians}")
    print(f"usual / ours: {ratio:.2f}; share of our step that is not the backbone: {rest:.2f}")


if __name__ == "__main__":
    main()
