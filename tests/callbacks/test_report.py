import base64
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers.tiny_dino import TinyDINO, TinyTokens, TinyViT, tiny_dino, view_loader
from helpers.tiny_dinov2 import GivenMasks, masked_loader, tiny_dinov2
from helpers.toy_training import rules, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib import image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dino_head.callbacks.report
from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import CollapseMonitorCallback, KNNProbeCallback, ReportCallback
from dino_head.callbacks.report import charts, pictures
from dino_head.callbacks.report.charts import overview
from dino_head.callbacks.report.curves import rescale_curves

FILES = {"report.html", "overview.png", "neighbours.png"}
WATCHED = FILES | {"curves.json"}
# Each run draws, and most only need a module to watch.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:teacher does not follow")]


def seeded(**options):
    torch.manual_seed(0)
    return tiny_dino(**options)


def images(samples=20, seed=1, labels=True, shape=(1, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(samples, *shape, generator=generator), torch.arange(samples) % 3
    return DataLoader(TensorDataset(*tensors[: 1 + labels]), batch_size=8)


def watching(folder, **options):
    return [
        CollapseMonitorCallback(2, patience=1000),
        KNNProbeCallback(images(), images(12, seed=2), k=5),
        ReportCallback(folder, **options),
    ]


def fit(module, *callbacks, data=None, **options):
    run = trainer(*callbacks, **options)
    run.fit(module, data or view_loader())
    return run


@pytest.fixture(autouse=True)
def few_neighbours(monkeypatch):
    """Drawing costs most of these tests' time, and each neighbour is a plot of its own."""
    monkeypatch.setattr(charts, "SHOWN", 2)
    monkeypatch.setattr(charts, "NEIGHBOURS", 1)


class Page(HTMLParser):
    """The texts of a page by their tag, and the sources of its pictures and links."""

    def __init__(self, file):
        super().__init__()
        self.texts, self.sources, self.open = {}, [], []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def test_the_page_shows_the_results_of_the_other_callbacks(tmp_path):
    monitor, probe, report = watching(tmp_path / "report")
    fit(seeded(), *rules(), monitor, probe, report)
    assert {file.name for file in (tmp_path / "report").iterdir()} == WATCHED
    page = Page(tmp_path / "report" / "report.html")
    last = monitor.history[-1]
    assert dict(zip(page.texts["dt"], page.texts["dd"], strict=True)) == {
        "loss, nats": f"{last['loss']:.3f}",
        "loss, normalized": f"{last['loss_normalized']:.3f}",
        "teacher entropy": f"{last['teacher_entropy']:.3f}",
        "KL": f"{last['kl']:.3f}",
        "RankMe": f"{last['rankme']:.1f}",
        "prototype perplexity": f"{last['prototype_perplexity']:.1f}",
        "kNN top-1": f"{100 * probe.history[-1]['top1']:.2f}%",
    }
    assert page.texts["h2"] == ["Diagnosis", "Course of the run", "Nearest neighbours", "Receipts of the callbacks"]
    assert page.texts["p"][1] == "Too early to tell: a diagnosis needs 1000 measurements."
    assert [text.split(" ")[0] for text in page.texts["li"]] == [
        "student.head.last_layer", "teacher", "weight_decay", "looked", "knn/top1",
    ]  # fmt: skip
    assert report.receipt.startswith(f"{tmp_path / 'report' / 'report.html'} written 1 times, in ")


def labels_of(axis):
    return {line.get_label() for line in axis.lines}


def test_the_page_of_a_module_with_several_terms_shows_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "overview", lambda *args: drawn.append(overview(*args)) or drawn[-1])
    monitor = CollapseMonitorCallback(2, patience=1000)
    module = tiny_dinov2(GivenMasks)
    # The batches 0 and 1 of each epoch have no mask, so that some measurements have patches alone.
    fit(module, *rules(), monitor, ReportCallback(tmp_path), data=masked_loader(none_in=range(8)))
    page = Page(tmp_path / "report.html")
    last, patches = monitor.history[-1], next(row for row in reversed(monitor.history) if "ibot/loss" in row)
    values = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert values["loss, nats"] == f"{last['loss']:.3f}"
    assert values["patch loss, nats"] == f"{patches['ibot/loss']:.3f}"
    assert values["patch loss, normalized"] == f"{patches['ibot/loss_normalized']:.3f}"
    assert values["patch KL"] == f"{patches['ibot/kl']:.3f}"
    assert values["patch RankMe"] == f"{patches['ibot/rankme']:.1f}"
    assert values["KoLeo"] == f"{monitor.terms[-1]['koleo']:.3f}"
    panels = {axis.get_title(): axis for axis in drawn[-1].axes}
    loss, of_patches = panels["The loss is teacher entropy + KL"], panels[charts.LOSSES["ibot/"][0]]
    assert "loss" in labels_of(loss)
    (line,) = [line for line in of_patches.lines if line.get_label() == "patch loss"]
    rows = [row for row in monitor.history if "ibot/loss" in row]
    np.testing.assert_allclose(line.get_xydata(), [[row["step"], row["ibot/loss"]] for row in rows])
    assert labels_of(panels["effective rank"]) == {"class tokens", "masked patches"}
    lines = {line.get_label(): line.get_xydata() for line in panels["Terms of the loss, means over epochs"].lines}
    for name, label in (("loss", "loss"), ("dino", "DINO"), ("ibot", "iBOT"), ("koleo", "KoLeo")):
        np.testing.assert_allclose(lines[label], [[row["step"], row[name]] for row in monitor.terms])
    fit(tiny_dinov2(), *watching(tmp_path / "other", reference=tmp_path / "curves.json")[::2])
    assert "reference: patch loss" in labels_of(
        {axis.get_title(): axis for axis in drawn[-1].axes}[charts.LOSSES["ibot/"][0]]
    )


def test_the_page_is_one_file_with_the_pictures_in_it(tmp_path):
    fit(seeded(), *watching(tmp_path))
    sources = Page(tmp_path / "report.html").sources
    assert len(sources) == 2
    for source, name in zip(sources, ("overview", "neighbours"), strict=True):
        assert (
            base64.b64decode(source.removeprefix("data:image/png;base64,")) == (tmp_path / f"{name}.png").read_bytes()
        )
    pixels = image.imread(tmp_path / "overview.png")
    assert pixels.shape[0] > 600
    assert pixels.std() > 0.05


def test_the_page_of_a_run_without_a_diagnosis_reports_none(tmp_path):
    monitor = CollapseMonitorCallback(2, patience=6)
    monitor._report = lambda *_: None
    fit(seeded(), monitor, ReportCallback(tmp_path))
    assert Page(tmp_path / "report.html").texts["p"][1].startswith("Nothing is wrong")
    assert monitor.receipt.endswith("diagnosis: none")


def test_diagnoses_are_shown_and_texts_are_escaped(tmp_path):
    monitor, probe, report = watching(tmp_path)

    class Say(Callback):
        def on_train_start(self, trainer, pl_module):
            monitor.diagnoses += ["uniform teacher: <b>5 & 6</b>", "no collapse: "]

    fit(seeded(), monitor, probe, Say(), report)
    text = (tmp_path / "report.html").read_text()
    assert '<p class="diagnosis bad">uniform teacher: &lt;b&gt;5 &amp; 6&lt;/b&gt;</p>' in text
    assert '<p class="diagnosis mild">no collapse: </p>' in text


class Written(Callback):
    """The epochs in which the page appeared or changed."""

    def __init__(self, file):
        self.file, self.epochs, self.last = file, [], None

    def look(self, trainer):
        now = self.file.stat().st_mtime_ns if self.file.exists() else None
        if now != self.last:
            self.epochs.append(trainer.current_epoch)
            self.last = now

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(trainer)

    def on_train_end(self, trainer, pl_module):
        self.look(trainer)


class Validated(TinyDINO):
    def validation_step(self, batch, batch_idx):
        pass


def test_without_validation_it_is_written_every_few_epochs_and_at_the_end(tmp_path):
    watch = watching(tmp_path, every_n_epochs=2)
    written = Written(tmp_path / "report.html")
    fit(seeded(), *watch, written, max_epochs=5)
    assert written.epochs == [2, 4, 5]
    assert watch[-1].receipt.split(" written ")[1].startswith("3 times")


def test_with_validation_it_is_written_after_each_and_at_the_end(tmp_path):
    module, watch = seeded(), watching(tmp_path, every_n_epochs=1)
    module.__class__ = Validated
    written = Written(tmp_path / "report.html")
    run = trainer(*watch, written, max_epochs=5, check_val_every_n_epoch=2, num_sanity_val_steps=1)
    run.fit(module, view_loader(), view_loader())
    assert written.epochs == [2, 4, 5]
    assert watch[1].history[1]["epoch"] == 1


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_order_of_the_callbacks_does_not_matter(order, tmp_path):
    watch = watching(tmp_path)
    monitor, probe, _ = watch
    fit(seeded(), *watch[order:], *watch[:order], *rules())
    page = Page(tmp_path / "report.html")
    assert page.texts["dd"][0] == f"{monitor.history[-1]['loss']:.3f}"
    assert page.texts["dd"][-1] == f"{100 * probe.history[-1]['top1']:.2f}%"
    assert len(page.texts["li"]) == 5


def random_run(*callbacks):
    module = seeded()
    for side, rate in zip((module.student, module.teacher), (0.2, 0.0), strict=True):
        side["backbone"] = nn.Sequential(side["backbone"], nn.Dropout(rate))
    data = DataLoader(view_loader().dataset, batch_size=4, shuffle=True)
    torch.manual_seed(1)
    fit(module, *rules(), *callbacks, data=data)
    return module.state_dict(), torch.get_rng_state()


def test_training_is_bitwise_the_same_without_the_callback(tmp_path):
    torch.testing.assert_close(random_run(), random_run(*watching(tmp_path, every_n_epochs=1)), rtol=0, atol=0)


def test_a_resumed_run_overwrites_its_report_and_a_new_run_raises(tmp_path):
    save = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
    fit(seeded(), *rules(), *watching(tmp_path), save, enable_checkpointing=True)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(MisconfigurationException, match="contains the report of another run: move it away, or give"):
        fit(seeded(), *rules(), *watching(tmp_path))
    assert (tmp_path / "report.html").read_bytes() == before
    resumed = watching(tmp_path)
    trainer(*rules(), *resumed).fit(seeded(), view_loader(), ckpt_path=tmp_path / "checkpoints" / "epoch=1.ckpt")
    assert len(resumed[0].history) == 6
    assert (tmp_path / "report.html").read_bytes() != before


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    watch = watching(tmp_path, every_n_epochs=1)
    fit(seeded(), *watch, max_epochs=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def disk_is_full(file, content):
        with open(file, "wb") as part:
            part.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", disk_is_full)
    run = trainer(ReportCallback(tmp_path, images(), images()), max_epochs=2)
    (tmp_path / "report.html").rename(tmp_path / "old.html")
    with pytest.warns(UserWarning, match=r"no report in epoch \d, and training continues: .*No space left"):
        run.fit(seeded(), view_loader())
    (tmp_path / "old.html").rename(tmp_path / "report.html")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "a loader yielded no batch"), (images(shape=(2, 8, 8)), "expected input.* to have 1 channels")],
)
def test_data_that_cannot_be_drawn_cause_a_warning_and_training_continues(data, message, tmp_path):
    watch = ReportCallback(tmp_path, data, data)
    with pytest.warns(UserWarning, match=f"with fewer pictures in epoch 3, and training continues: .*{message}"):
        run = fit(seeded(), *watching(tmp_path)[:1], watch)
    assert run.global_step == 12
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "overview.png", "curves.json"}


@pytest.mark.filterwarnings("ignore:not finite")
def test_weights_that_are_not_finite_still_get_a_page_with_the_diagnosis(tmp_path):
    class Break(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.teacher["backbone"][0].weight.data.fill_(torch.nan)

    watch = CollapseMonitorCallback(1, patience=1000), ReportCallback(tmp_path, images(), images())
    with pytest.warns(UserWarning, match="fewer pictures in epoch 3.* 20 of 20 features contain NaN"):
        fit(seeded(), *watch, Break())
    page = Page(tmp_path / "report.html")
    assert any(text.startswith("not finite: ") for text in page.texts["p"])


def test_without_matplotlib_an_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "dino_head.callbacks.report.charts", raising=False)
    monkeypatch.delattr(dino_head.callbacks.report, "charts", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r'ReportCallback needs matplotlib: pip install "dino-head\[train\]"'):
        fit(seeded(), ReportCallback(tmp_path))


# Charts and pictures


def test_alone_it_writes_the_receipts(tmp_path):
    fit(seeded(), *rules(), ReportCallback(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"report.html"}
    page = Page(tmp_path / "report.html")
    assert len(page.texts["li"]) == 3
    assert "there is no CollapseMonitorCallback" in page.texts["p"][1]


def test_images_without_labels_are_drawn_without_frames(tmp_path):
    fit(seeded(), ReportCallback(tmp_path, images(labels=False), images(labels=False)))
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert "Green frames" not in (tmp_path / "report.html").read_text()
    pixels = image.imread(tmp_path / "neighbours.png")[..., :3]
    assert np.ptp(pixels, axis=-1).max() == 0  # grey


def test_frames_tell_right_from_wrong(tmp_path, monkeypatch):
    """Among the same images, the nearest neighbour of an image is itself."""
    monkeypatch.setattr(charts, "NEIGHBOURS", 6)
    data = images(12)
    watch = ReportCallback(tmp_path, data, data)
    fit(seeded(), watch)
    assert "Green frames: the same label; red: another" in (tmp_path / "report.html").read_text()
    pixels = image.imread(tmp_path / "neighbours.png")[..., :3]
    coloured = np.ptp(pixels, axis=-1) > 0.2
    green = coloured & (pixels[..., 1] > pixels[..., 0])
    columns = np.array_split(np.arange(pixels.shape[1]), 7)
    assert not coloured[:, columns[0]].any()  # the held-out images
    assert (coloured & ~green).any()
    assert green[:, columns[1]].sum() > 0.9 * coloured[:, columns[1]].sum()


class Datamodule(LightningDataModule):
    def train_dataloader(self):
        return view_loader()

    def knn_dataloaders(self):
        return images(), images(seed=2)


def test_the_datamodules_images_are_drawn(tmp_path):
    trainer(ReportCallback(tmp_path)).fit(seeded(), Datamodule())
    assert {file.name for file in tmp_path.iterdir()} == FILES


def vit(channels=1, registers=0):
    torch.manual_seed(0)
    head = DINOProjectionHead(16, 8, 4, 16, batch_norm=False)
    return TinyDINO(TinyViT(channels, registers), head, DINOLoss(16), lambda x: [x, x.flip(-1)], warmup_epochs=1)


@pytest.mark.parametrize("registers", [0, 4])
def test_patch_tokens_and_attention_of_the_backbone_are_drawn(registers, tmp_path):
    fit(vit(registers=registers), ReportCallback(tmp_path, images(), images(seed=2)))
    assert {file.name for file in tmp_path.iterdir()} == {*FILES, "patches.png"}
    page = Page(tmp_path / "report.html")
    assert "Patch tokens and attention" in page.texts["h2"]
    pixels = image.imread(tmp_path / "patches.png")[..., :3]
    assert np.ptp(pixels, axis=-1).max() > 0.5  # in colours


def test_the_class_tokens_of_a_backbone_with_patch_tokens_are_drawn():
    module, data = vit(), images()
    module.backbone = TinyTokens()
    run = trainer(max_epochs=0)
    run.fit(module, view_loader())
    samples = pictures.take_samples(run, module, module.backbone, data, 20)
    torch.testing.assert_close(samples.features, module.backbone(data.dataset.tensors[0])[0])


def test_maps_are_the_tokens_components_and_the_class_tokens_attention():
    backbone, data = TinyViT(registers=2), torch.randn(3, 1, 8, 16)
    tokens, attention = backbone.tokens(data)
    found = pictures.patch_tokens(backbone, data)
    torch.testing.assert_close(found, tokens[:, 3:].reshape(3, 2, 4, 16))
    expected = attention[:, :, 0, 3:].mean(dim=1).reshape(3, 2, 4)
    torch.testing.assert_close(pictures.attention_maps(backbone, data), expected)
    colours = pictures.as_colours(found)
    assert colours.shape == (3, 2, 4, 3)
    first = torch.linalg.svd(found.reshape(24, 16) - found.reshape(24, 16).mean(dim=0))[2][0]
    along = (found.reshape(24, 16) - found.reshape(24, 16).mean(dim=0)) @ first
    correlation = torch.corrcoef(torch.stack([along, colours[..., 0].flatten()]))[0, 1].abs()
    assert correlation > 0.98  # the outermost percent is cut off


@pytest.mark.parametrize(("height", "width", "extra"), [(8, 8, 1), (8, 16, 1), (24, 24, 5), (16, 8, 0)])
def test_without_a_patch_size_the_largest_grid_is_taken(height, width, extra):
    class Backbone:
        def get_intermediate_layers(self, images, n):
            return [torch.arange(extra + height * width // 4).repeat(len(images), 1)[..., None].float()]

    found = pictures.patch_tokens(Backbone(), torch.zeros(2, 3, height, width))
    assert found.shape == (2, height // 2, width // 2, 1)
    assert found[0, 0, 0, 0] == extra


def test_principal_components_are_those_of_the_covariance():
    features = torch.randn(50, 6) @ torch.randn(6, 6)
    found = pictures.principal_components(features, 2)
    variances = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)
    torch.testing.assert_close(torch.cov(found.T), torch.diag(variances[:2]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pictures.principal_components(features.flip(0), 2), found.flip(0), rtol=1e-3, atol=1e-3)
    assert pictures.principal_components(torch.ones(3, 1), 2).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 1, 8, 8), (2, 8, 8, 3)),
        ((2, 3, 192, 96), (2, 96, 48, 3)),
        ((2, 2, 8, 8), (2, 8, 8, 3)),
        ((2, 13, 8, 8), (2, 8, 8, 3)),
        ((2, 1, 5, 8, 8), (2, 8, 8, 3)),
        ((2, 8), None),
    ],
)
def test_thumbnails_of_all_kinds(shape, expected):
    inputs = 100 * torch.randn(shape) + 7
    found = pictures.thumbnails(inputs)
    assert (found if found is None else tuple(found.shape)) == expected
    if found is not None:
        assert found.min() == 0
        assert found.max() == 1
    if len(shape) == 5:
        middle = pictures.thumbnails(inputs[:, :, 2])
        torch.testing.assert_close(found, middle)


def test_volumes_are_shown_by_their_middle_slice(tmp_path):
    module = seeded()
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    module.student["backbone"], module.teacher["backbone"] = net, nn.Sequential(*net)
    module.teacher["backbone"] = nn.Sequential(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    module.teacher["backbone"].load_state_dict(net.state_dict())
    module.teacher.requires_grad_(False)
    module.augment = lambda volumes: [volumes, volumes.flip(-1)]
    data = images(shape=(1, 5, 8, 8), labels=False)
    fit(module, ReportCallback(tmp_path, data, data), data=images(16, shape=(1, 5, 8, 8)))
    assert {file.name for file in tmp_path.iterdir()} == FILES


def test_inputs_that_are_no_images_get_only_a_map(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 4)

        def forward(self, x):
            return self.layer(x.flatten(1))

    module = seeded()
    module.student["backbone"], module.teacher["backbone"] = Flat(), Flat().requires_grad_(False)
    module.augment = lambda x: [x, -x]
    data = images(shape=(32,))
    fit(module, ReportCallback(tmp_path, data, data), data=data)
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "overview.png"}


def test_many_classes_need_no_legend(tmp_path):
    data = DataLoader(TensorDataset(torch.randn(60, 1, 8, 8), torch.arange(60)), batch_size=20)
    fit(seeded(), ReportCallback(tmp_path, data, data))
    assert image.imread(tmp_path / "overview.png").shape[1] < 800


# Loggers


class TakesImages(CSVLogger):
    """Like WandbLogger."""

    def log_image(self, key, images, step=None):
        self.sent = [*getattr(self, "sent", []), (key, [image.imread(file).shape for file in images], step)]


class Board(CSVLogger):
    """Like TensorBoardLogger."""

    class Writer:
        def __init__(self):
            self.sent = []

        def add_image(self, tag, img_tensor, global_step=None, dataformats="CHW"):
            self.sent.append((tag, img_tensor.shape[2], global_step, dataformats))

        def log_metrics(self, metrics, step):
            pass

        def save(self):
            pass

    experiment = Writer()


def test_pictures_go_to_loggers_that_take_them(tmp_path):
    one, other = TakesImages(tmp_path / "one"), Board(tmp_path / "other")
    fit(seeded(), *watching(tmp_path / "report"), logger=[one, other], log_every_n_steps=1)
    assert [(key, step) for key, _, step in one.sent] == [("report/overview", 12), ("report/neighbours", 12)]
    assert other.experiment.sent == [("report/overview", 4, 12, "HWC"), ("report/neighbours", 4, 12, "HWC")]


def test_the_folder_defaults_to_the_loggers(tmp_path):
    fit(seeded(), ReportCallback(), logger=CSVLogger(tmp_path, name="mine"), log_every_n_steps=1)
    assert (tmp_path / "mine" / "version_0" / "report.html").exists()
    fit(seeded(), ReportCallback(), default_root_dir=tmp_path / "root")
    assert (tmp_path / "root" / "report.html").exists()


@pytest.mark.parametrize("options", [{"every_n_epochs": 0}, {"max_samples": 0}])
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        ReportCallback(**options)


def test_one_loader_without_the_other_raises_when_training_starts(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="needs images, and TinyDINO has no knn_dataloaders and no test_"
    ):
        fit(seeded(), ReportCallback(tmp_path, images()))


class TrainOnly(LightningDataModule):
    def train_dataloader(self):
        return view_loader()


def test_a_datamodule_without_labelled_data_gets_a_page_without_pictures(tmp_path):
    trainer(ReportCallback(tmp_path)).fit(seeded(), TrainOnly())
    assert {file.name for file in tmp_path.iterdir()} == {"report.html"}


@pytest.mark.parametrize(
    "method", [lambda images, layers: images, lambda images, n: [images], lambda images, n: {}["tokens"]]
)
def test_a_backbone_whose_patch_tokens_fail_keeps_the_other_pictures(method, tmp_path):
    module = vit()
    module.teacher["backbone"].get_intermediate_layers = method
    with pytest.warns(UserWarning, match="with fewer pictures in epoch 3"):
        fit(module, ReportCallback(tmp_path, images(), images(seed=2)))
    assert {file.name for file in tmp_path.iterdir()} == FILES


def test_a_fast_dev_run_writes_nothing(tmp_path):
    fit(seeded(), *watching(tmp_path), fast_dev_run=True)
    fit(seeded(), *watching(tmp_path), max_epochs=1)
    assert {file.name for file in tmp_path.iterdir()} == WATCHED
    before = (tmp_path / "report.html").read_bytes()
    fit(seeded(), *watching(tmp_path), fast_dev_run=True)  # beside a finished run
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_missing_module_raises_when_training_starts(tmp_path):
    with pytest.raises(MisconfigurationException, match=re.escape("has no submodule 'net'")):
        fit(seeded(), ReportCallback(tmp_path, images(), images(), module="net"))


def curves(steps=100):
    """Curves of a good run, as a report writes them."""
    looks = [
        {"step": float(step), "loss_normalized": 1 - step / 200, "teacher_entropy_normalized": 0.5}
        for step in (0, 50, 100)
    ]
    return {"steps": steps, "looks": looks, "probes": [{"step": 50.0, "top1": 0.25}, {"step": 100.0, "top1": 0.75}]}


def test_a_report_draws_the_curves_of_another_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "overview", lambda *args, **options: drawn.append(overview(*args)) or drawn[-1])
    file = tmp_path / "curves.json"
    file.write_text(json.dumps(curves()))
    run = fit(seeded(), *watching(tmp_path / "one", reference=file), max_epochs=2)
    loss, quality = drawn[-1].axes[:2]
    lines = {line.get_label(): line.get_xydata() for line in loss.lines}
    (level,) = {line.get_ydata()[0] for line in loss.lines if "uniform" in line.get_label()}
    assert level == pytest.approx(np.log(16))
    steps = run.global_step  # the 100 steps of the reference are rescaled to them
    expected = [[0, level], [steps / 2, 0.75 * level], [steps, level / 2]]
    np.testing.assert_allclose(lines["reference: loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(lines["reference: teacher entropy"][:, 1], level / 2, rtol=1e-6)
    knn = [line.get_xydata() for line in quality.lines if line.is_dashed()]
    np.testing.assert_allclose(knn, [[[steps / 2, 25], [steps, 75]]])
    assert "Dashed: the reference" in (tmp_path / "one" / "report.html").read_text()
    fit(seeded(), *watching(tmp_path / "other", reference=tmp_path / "one" / "curves.json"))


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"steps": 1, "looks": [{}], "probes": []}'])
def test_a_file_that_is_no_reference_raises(text, tmp_path):
    file = tmp_path / "curves.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=r"reference='.*curves\.json' is not the curves\.json of a ReportCallback \("):
        ReportCallback(tmp_path, reference=file)


def test_a_reference_is_not_rescaled_to_a_run_without_an_end():
    assert rescale_curves(curves(), float("inf"))["loss_normalized"][0] == [0, 50, 100]
    assert rescale_curves(curves(), 1000)["top1"] == ([500, 1000], [0.25, 0.75])
