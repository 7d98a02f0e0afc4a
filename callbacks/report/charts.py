"""The report's charts, drawn with matplotlib without a window or global state.

Sizes: N samples, k neighbours, h and w patches.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps, image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from dino_head._indices import spaced_indices
from dino_head.callbacks.report.curves import Curves
from dino_head.callbacks.report.pictures import PatchMaps, Samples, as_colours, principal_components
from dino_head.metrics._neighbours import nearest

History = Sequence[dict[str, float]]

DASHED: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.0, "alpha": 0.8}
GREY, RIGHT, WRONG = "0.45", "tab:green", "tab:red"
SCHEDULES = {
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "teacher_temp": "teacher temperature",
    "teacher_momentum": "teacher momentum",
}
# The panel's title, and the name of the loss in the legend, by the prefix of its values.
LOSSES = {
    "": ("The loss is teacher entropy + KL", "loss"),
    "ibot/": ("The loss of masked patches is teacher entropy + KL", "patch loss"),
}
TERMS = {
    "loss": ("loss", "black"),
    "dino": ("DINO", "tab:blue"),
    "ibot": ("iBOT", "tab:orange"),
    "koleo": ("KoLeo", "tab:green"),
}
AXES = ("first", "second")
MAX_CLASSES = 20  # with separate colours and names
SHOWN, NEIGHBOURS = 6, 6  # held-out images, and neighbours of each


class Chart(NamedTuple):
    """A figure with its name and its texts."""

    name: str
    title: str
    caption: str
    figure: Figure


def draw_charts(
    measurements: History,
    probes: History,
    train: Samples | None,
    test: Samples | None,
    maps: PatchMaps,
    reference: Curves | None,
    terms: History = (),
) -> list[Chart]:
    """Draw all charts for which there are data, with the curves of the reference for comparison."""
    charts = []
    if measurements or probes or test is not None:
        caption = ""
        if measurements:
            caption = (
                "The student lowers the KL. It cannot lower the teacher's entropy, which is ln K if the teacher is "
                "uniform. A loss above ln K means that the student is far from its teacher."
            )
        if any("ibot/loss" in row for row in measurements):
            caption += " The loss of the masked patches (iBOT) is the mean over patches, split in the same way."
        if terms:
            caption += " Terms of the loss: means over each epoch, as the module logs them."
        if reference:
            caption += " Dashed: the reference, normalized by ln K, at the same share of its run."
        figure = overview(measurements, probes, test, reference or {}, terms)
        charts.append(Chart("overview", "Course of the run", caption, figure))
    if train is not None and test is not None and train.pictures is not None and test.pictures is not None:
        caption = "Held-out images (left) and the training images nearest to them, with their cosine similarity."
        caption += _visible_part(test.inputs)
        if train.labels is not None and test.labels is not None:
            caption += " Green frames: the same label; red: another."
        charts.append(Chart("neighbours", "Nearest neighbours", caption, neighbours(train, test)))
    if test is not None and test.pictures is not None and (maps.tokens is not None or maps.attention is not None):
        caption = (
            "Patch tokens: their first three principal components over all these images as red, green and blue. "
            "Attention: from the class token, mean over the heads, on each image's own scale."
        )
        charts.append(Chart("patches", "Patch tokens and attention", caption, patches(test.pictures, maps)))
    return charts


def read_pixels(file: Path) -> Any:
    """Pixels (H, W, 3 or 4) of a PNG file."""
    return image.imread(file)


def overview(
    measurements: History, probes: History, test: Samples | None, reference: Curves, terms: History = ()
) -> Figure:
    """Draw the losses, rank and kNN, the terms, schedules, and a map of held-out features, if there are data."""
    panels: list[Any] = []
    for prefix in LOSSES:
        of_loss = _with(measurements, f"{prefix}loss")
        if of_loss:
            panels.append(partial(_loss, measurements=of_loss, reference=reference, prefix=prefix))
    if measurements or probes:
        panels.append(lambda figure, spec: _quality(figure.add_subplot(spec), measurements, probes, reference))
    if terms:
        panels.append(lambda figure, spec: _terms(figure, spec, terms))
    if measurements:
        panels.append(lambda figure, spec: _schedules(figure, spec, measurements))
    if test is not None:
        panels.append(lambda figure, spec: _feature_map(figure.add_subplot(spec), test.features, test.labels))
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = Figure(figsize=(6 * columns, 4.5 * rows), layout="constrained")
    grid = figure.add_gridspec(max(1, rows), max(1, columns))
    for index, draw in enumerate(panels):
        draw(figure, grid[divmod(index, 2)])
    return figure


def neighbours(train: Samples, test: Samples) -> Figure:
    """Draw some held-out images, each in a row with its nearest training images."""
    assert train.pictures is not None
    assert test.pictures is not None
    shown = spaced_indices(len(test.features), min(SHOWN, len(test.features)))
    similarity, indices = nearest(
        F.normalize(test.features[shown], dim=1),
        F.normalize(train.features, dim=1),
        min(NEIGHBOURS, len(train.features)),
    )
    figure = Figure(figsize=(1.2 * (indices.shape[1] + 1), 1.4 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), indices.shape[1] + 1, squeeze=False)
    for row, sample in enumerate(shown):
        _show(axes[row, 0], test.pictures[sample], "held out")
        for column, (value, index) in enumerate(zip(similarity[row].tolist(), indices[row].tolist(), strict=True)):
            frame = None
            if train.labels is not None and test.labels is not None:
                frame = RIGHT if train.labels[index] == test.labels[sample] else WRONG
            _show(axes[row, column + 1], train.pictures[index], f"{value:.3f}", frame)
    return figure


def patches(images: Tensor, maps: PatchMaps) -> Figure:
    """Draw the first images (N, H, W, 3), each in a column above the maps of its patches."""
    colours = None if maps.tokens is None else as_colours(maps.tokens)
    rows = [("image", images), ("patch tokens", colours), ("attention", maps.attention)]
    given = [(name, values) for name, values in rows if values is not None]
    count = min(len(values) for _, values in given)
    figure = Figure(figsize=(1.8 * count + 0.4, 1.8 * len(given)), layout="constrained")
    axes = figure.subplots(len(given), count, squeeze=False)
    for row, (name, values) in enumerate(given):
        for column in range(count):
            _show(axes[row, column], values[column])
        axes[row, 0].set_ylabel(name)
    return figure


def _loss(figure: Figure, spec: Any, *, measurements: History, reference: Curves, prefix: str) -> None:
    axis = figure.add_subplot(spec)
    title, of_loss = LOSSES[prefix]
    steps = _column(measurements, "step")
    loss, entropy, normalized = (
        _column(measurements, f"{prefix}{name}") for name in ("loss", "teacher_entropy", "loss_normalized")
    )
    ratios = (value / share for value, share in zip(loss, normalized, strict=True) if share > 0)
    limit = next(ratios, math.nan)  # ln K
    axis.fill_between(steps, entropy, color="tab:blue", alpha=0.25, linewidth=0, label="teacher entropy")
    axis.fill_between(steps, entropy, loss, color="tab:orange", alpha=0.4, linewidth=0, label="KL")
    axis.plot(steps, loss, color="black", linewidth=1.2, label=of_loss, **_marker(steps))
    for name, label, colour in (
        (f"{prefix}loss_normalized", f"reference: {of_loss}", "black"),
        (f"{prefix}teacher_entropy_normalized", "reference: teacher entropy", "tab:blue"),
    ):
        if name in reference:
            x, shares = reference[name]
            axis.plot(x, [share * limit for share in shares], color=colour, label=label, **DASHED)
    axis.axhline(limit, color=GREY, linestyle="--", label=f"ln K = {limit:.2f}: uniform")
    axis.set(title=title, ylabel="nats", xlabel="optimizer steps", ylim=(0, None))
    axis.legend(loc="best", edgecolor="none", fontsize="small")


def _terms(figure: Figure, spec: Any, terms: History) -> None:
    axis = figure.add_subplot(spec)
    for name, (label, colour) in TERMS.items():
        rows = _with(terms, name)
        if rows:
            axis.plot(_column(rows, "step"), _column(rows, name), color=colour, label=label, **_marker(rows))
    axis.set(title="Terms of the loss, means over epochs", xlabel="optimizer steps", ylabel="as logged")
    axis.set_xlim(*figure.axes[0].get_xlim())  # as for the loss
    axis.legend(loc="best", edgecolor="none", fontsize="small")


def _quality(axis: Axes, measurements: History, probes: History, reference: Curves) -> None:
    axis.set(xlabel="optimizer steps")
    if probes:
        steps = _column(probes, "step")
        percent = [100 * value for value in _column(probes, "top1")]
        axis.plot(steps, percent, color="tab:green", label="kNN accuracy", **_marker(steps))
        axis.annotate(f"{percent[-1]:.1f}%", (steps[-1], percent[-1]), (0, -14), textcoords="offset points", ha="right")
        if "top1" in reference:
            x, shares = reference["top1"]
            axis.plot(x, [100 * share for share in shares], color="tab:green", **DASHED)
        axis.set_ylabel("kNN accuracy, %", color="tab:green")
        axis.set_ylim(top=min(axis.get_ylim()[1], 100.5))
    if measurements:
        other = axis.twinx() if probes else axis
        kinds = [("rankme", "class tokens", "-"), ("ibot/rankme", "masked patches", ":")]
        drawn = [(name, label, style) for name, label, style in kinds if _with(measurements, name)]
        for name, label, style in drawn:
            rows = _with(measurements, name)
            x, y = _column(rows, "step"), _column(rows, name)
            other.plot(x, y, color="tab:purple", label=label, linestyle=style, **_marker(rows))
        other.set_ylabel("RankMe of the embeddings", color="tab:purple")
        other.set_ylim(0, 1.08 * other.get_ylim()[1])
        if len(drawn) > 1:
            other.legend(loc="best", edgecolor="none", fontsize="small")
    names = ["kNN accuracy"] * bool(probes) + ["effective rank"] * bool(measurements)
    axis.set_title(" and ".join(names))


def _schedules(figure: Figure, spec: Any, measurements: History) -> None:
    names = [name for name in SCHEDULES if _with(measurements, name)]
    grid = spec.subgridspec(len(names), 1, hspace=0.08)
    for index, name in enumerate(names):
        axis = figure.add_subplot(grid[index])
        known = _with(measurements, name)
        axis.plot(_column(known, "step"), _column(known, name), color="tab:blue", **_marker(known))
        axis.set_xlim(*figure.axes[0].get_xlim())  # as for the loss
        axis.margins(y=0.25)
        axis.set_title(SCHEDULES[name], loc="left", fontsize="small", pad=3)
        axis.tick_params(labelsize="small", labelbottom=index == len(names) - 1)
        axis.yaxis.get_major_formatter().set_useOffset(False)  # type: ignore[attr-defined]
    axis.set_xlabel("optimizer steps")


def _feature_map(axis: Axes, features: Tensor, labels: Tensor | None) -> None:
    components = principal_components(features, 2)
    shares = (components.var(dim=0) / features.var(dim=0).sum()).nan_to_num().tolist()
    x, y = components.T.tolist()
    classes = [] if labels is None else labels.unique().tolist()
    if labels is None:
        axis.scatter(x, y, s=12, color="tab:blue", linewidths=0)
    elif len(classes) > MAX_CLASSES:
        axis.scatter(x, y, s=12, c=labels.tolist(), cmap="turbo", linewidths=0)
    else:
        colours = colormaps["tab10" if len(classes) <= 10 else "tab20"]
        for index, label in enumerate(classes):
            x, y = components[labels == label].T.tolist()
            axis.scatter(x, y, s=12, color=colours(index), label=str(label), linewidths=0)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="label", fontsize="small")
    first, second = (f"{name}: {share:.0%} of the variance" for name, share in zip(AXES, shares, strict=True))
    axis.set(title="Held-out features, principal components", xticks=[], yticks=[], xlabel=first, ylabel=second)


def _show(axis: Axes, picture: Tensor, title: str = "", frame: str | None = None) -> None:
    axis.imshow(torch.as_tensor(picture).numpy(), vmin=0 if picture.dim() == 3 else None)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize="small", pad=3)
    for spine in axis.spines.values():
        spine.set(visible=frame is not None, edgecolor=frame, linewidth=2.5)


def _visible_part(inputs: Tensor | None) -> str:
    if inputs is None:
        return ""
    part = " Volumes are shown by their middle slice." if inputs.dim() == 5 else ""
    channels = " Channels: the first, or the first three." if inputs.shape[1] not in (1, 3) else ""
    return part + channels


def _with(history: History, name: str) -> History:
    """The rows that have this value."""
    return [row for row in history if name in row]


def _column(history: History, name: str) -> list[float]:
    return [row[name] for row in history]


def _marker(values: Sequence[Any]) -> dict[str, Any]:
    return {"marker": "."} if len(values) < 20 else {}
