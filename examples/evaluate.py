"""What one looks at while DINO trains: kNN accuracy, the teacher's entropy, and a page of plots.

Sizes: N samples, D features, K prototypes.
"""

import csv
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from dino_head import DINOLoss, FactoredLogits


@torch.no_grad()
def extract(module: LightningModule, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features (N, D) of images (N, C, H, W), in eval mode; every submodule's mode is put back afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    features = [module(batch.to(module.device)).float().cpu() for batch in images.split(batch_size)]
    for submodule, mode in modes:
        submodule.training = mode
    return torch.cat(features)


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 10) -> float:
    """Share of the test features (N, D) whose k nearest training features (cosine) mostly have the right label."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T  # (N test, N train)
    votes = F.one_hot(train_labels[similarity.topk(k).indices]).sum(dim=1)  # (N test, classes)
    return multiclass_accuracy(votes.argmax(dim=1), test_labels, votes.shape[1], average="micro").item()


class KNN(Callback):
    """Logs the kNN accuracy of the teacher's features as `knn_top1`, every few epochs and after the last."""

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], every_n_epochs: int = 5) -> None:
        self.train, self.test, self.every_n_epochs = train, test, every_n_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Images and labels (N, C, H, W), (N,) -> one figure."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs:
            accuracy = knn_accuracy(
                extract(pl_module, self.train[0]), self.train[1], extract(pl_module, self.test[0]), self.test[1]
            )
            pl_module.log("knn_top1", accuracy, prog_bar=True)


class TeacherEntropy(Callback):
    """Logs the entropy of the teacher's distributions in nats as `teacher_entropy`: between 0 and ln K."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the loss: its inputs are all that is needed."""
        for module in pl_module.modules():
            if isinstance(module, DINOLoss):
                self._hook = module.register_forward_pre_hook(self._measure)
        self._entropies: list[Tensor] = []

    @torch.no_grad()
    def _measure(self, loss: DINOLoss, inputs: tuple[Tensor | FactoredLogits, Any, int]) -> None:
        teacher, _, epoch = inputs
        logits = teacher.logits() if isinstance(teacher, FactoredLogits) else teacher  # (T, B, K)
        assert loss.center is not None, "with centering='sinkhorn' the targets follow from the batch"
        logits = (logits - loss.center) / loss.temperature(epoch)
        self._entropies.append(torch.distributions.Categorical(logits=logits).entropy().mean())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's mean."""
        pl_module.log("teacher_entropy", torch.stack(self._entropies).mean())
        self._entropies = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen no longer."""
        self._hook.remove()


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The CSV files of all parts of a run as {metric: [(epoch, value)]}; a resumed part overrules the one before."""
    metrics: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("*/metrics.csv"), key=lambda file: int(file.parent.name.removeprefix("version_"))):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in {"epoch", "step"}:
                        metrics.setdefault(name, {})[int(row["epoch"])] = float(value)
    return {name: sorted(values.items()) for name, values in metrics.items()}


def plot_report(file: Path, metrics: Path, features: Tensor, labels: Tensor, output_dim: int, knn_raw: float) -> None:
    """Four panels: loss and teacher entropy against ln K, kNN, and a map of the features (N, D)."""
    values = read_metrics(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(11, 9))
    limit = math.log(output_dim)
    for axis, name, title in ((axes[0, 0], "loss", "Loss"), (axes[0, 1], "teacher_entropy", "Teacher entropy")):
        _plot_curve(axis, values[name], limit, f"ln {output_dim} = {limit:.2f}: uniform")
        axis.set(title=title, ylabel="nats", ylim=(0, 1.1 * max(limit, *(value for _, value in values[name]))))
    percent = [(epoch, 100 * value) for epoch, value in values["knn_top1"]]
    _plot_curve(axes[1, 0], percent, 100 * knn_raw, f"raw pixels: {100 * knn_raw:.1f}%")
    axes[1, 0].set(title="kNN accuracy of the teacher's features", ylabel="% of held-out images")
    _plot_map(axes[1, 1], features, labels)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _plot_curve(axis: Axes, values: list[tuple[int, float]], reference: float, meaning: str) -> None:
    epochs, heights = zip(*values, strict=True)
    axis.plot([epoch + 1 for epoch in epochs], heights, marker="." if len(epochs) < 20 else None)
    axis.axhline(reference, color="tab:gray", linestyle="--")
    axis.text(0.98, reference, meaning, va="bottom", ha="right", transform=axis.get_yaxis_transform(), color="dimgray")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epochs")


def _plot_map(axis: Axes, features: Tensor, labels: Tensor) -> None:
    unit = F.normalize(features, dim=1).numpy()
    reduced = PCA(min(30, *unit.shape), random_state=0).fit_transform(unit)
    x, y = TSNE(perplexity=min(30, (len(unit) - 1) / 3), random_state=0).fit_transform(reduced).T
    for label in labels.unique().tolist():
        chosen = (labels == label).numpy()
        axis.scatter(x[chosen], y[chosen], s=14, label=str(label), color=plt.get_cmap("tab10")(label % 10))
    axis.set(title="Features of held-out images (t-SNE)", xticks=[], yticks=[])
    axis.legend(title="digit", loc="center left", bbox_to_anchor=(1, 0.5))
