"""The pictures and numbers of docs/collapse.md, from runs on the digits: a healthy one and five others.

    .venv/bin/python docs/collapse.py            # about ten minutes; writes docs/collapse/

Shorter runs with --epochs, in another folder with --out, only show that everything works.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn

from dino_head.callbacks import (
    CollapseMonitorCallback,
    FreezeLastLayerCallback,
    KNNProbeCallback,
    ReportCallback,
    TeacherUpdateCallback,
)
from dino_head.examples.dino_module import DINO
from dino_head.examples.fit_digits import Digits, build


class Constant(nn.Module):
    """A backbone that ignores its input, as if all images were black after a wrong normalisation."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """The features of black images."""
        features: Tensor = self.backbone(images * 0)
        return features


def plain_head(model: DINO) -> None:
    """Remove batch norm from both heads, because it makes a collapse less likely."""
    for side in (model.student, model.teacher):
        layers = side["head"].layers
        side["head"].layers = nn.Sequential(*[part for part in layers if not isinstance(part, nn.BatchNorm1d)])


def healthy(model: DINO) -> None:
    """Change nothing; for digits, 8,192 prototypes are many."""


def uniform(model: DINO) -> None:
    """Set too high a temperature for the teacher."""
    model.loss.warmup_teacher_temp = model.loss.teacher_temp = 0.1


def one_hot(model: DINO) -> None:
    """Stop the updates of the center."""
    plain_head(model)
    model.loss.center_momentum = 1.0


def black(model: DINO) -> None:
    """Make all images equal."""
    plain_head(model)
    for side in (model.student, model.teacher):
        side["backbone"] = Constant(side["backbone"])


def left_behind(model: DINO) -> None:
    """Change nothing here; `main` omits TeacherUpdateCallback."""


RUNS: dict[str, tuple[Callable[[DINO], None], int]] = {  # with the number of epochs
    "healthy": (healthy, 60),
    "uniform": (uniform, 30),
    "one_hot": (one_hot, 30),
    "black": (black, 30),
    "left_behind": (left_behind, 30),
    "many": (healthy, 30),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train each model, and save its picture, its curves and its diagnoses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "collapse", help="folder (%(default)s)")
    parser.add_argument("--epochs", type=int, help="epochs of each run, instead of 60 and 30")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    said = {}
    for case, (spoil, epochs) in RUNS.items():
        seed_everything(0, verbose=False)
        model = build(8192 if case == "many" else 512)  # prototypes
        spoil(model)
        monitor, probe = CollapseMonitorCallback(every_n_steps=10), KNNProbeCallback(k=10, every_n_epochs=5)
        reference = None if case == "healthy" else args.out / "healthy.json"
        folder = Path(tempfile.mkdtemp())
        watching = [monitor, probe, ReportCallback(folder, reference=reference)]
        callbacks: list[Callback] = [FreezeLastLayerCallback(), *watching]
        if case != "left_behind":
            callbacks.append(TeacherUpdateCallback(base_momentum=0.98))
        trainer = Trainer(
            max_epochs=args.epochs or epochs,
            gradient_clip_val=3.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, Digits())
        shutil.copy(folder / "overview.png", args.out / f"{case}.png")
        if reference is None:
            shutil.copy(folder / "curves.json", args.out / "healthy.json")
        shutil.rmtree(folder)
        values = ("loss_normalized", "teacher_entropy_normalized", "kl", "rankme")
        last = {name: round(monitor.history[-1][name], 4) for name in values}
        said[case] = {"diagnoses": monitor.diagnoses, "knn_top1": round(probe.history[-1]["top1"], 4), **last}
    (args.out / "said.json").write_text(json.dumps(said, indent=2) + "\n")
    print(json.dumps(said, indent=2))


if __name__ == "__main__":
    main()
