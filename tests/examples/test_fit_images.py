import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy_training import trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_head.callbacks import TeacherUpdateCallback
from dino_head.cli.run_folder import WholeCheckpoints
from dino_head.examples import fit_images
from dino_head.examples.fit_images import build, main, parse
from dino_head.vision import backbones
from dino_head.vision.data_wait import DataWait
from dino_head.vision.image_data import ImageData, StreamData

SCRIPT = Path(fit_images.__file__)
TINY = ["--size", "tiny", "--prototypes", "64", "--global-size", "32", "--local-size", "16", "--batch-size", "16"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*fork.*", "ignore:.*logging interval")


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Lists of files are kept here, and the Hub is not asked."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", cache)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def make_photos(root, classes=("light", "dark")):
    random = np.random.default_rng(0)
    for number in range(40):
        folder = root / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        low = 128 * (number % len(classes) == 0)
        Image.fromarray(random.integers(low, low + 127, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    (root / classes[0] / "text.jpg").write_text("no image")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory, offline):
    return make_photos(tmp_path_factory.mktemp("photos"))


def options(photos, out, epochs, workers=1):
    return ["--data", str(photos), "--out", str(out), "--epochs", str(epochs), "--workers", str(workers), *TINY]


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "images"
    main(options(photos, out, 3))
    return out


def saved(file):
    return torch.load(file, weights_only=True)


def test_a_run_on_a_folder_writes_what_it_says(run):
    assert {file.name for file in run.iterdir()} == {
        "settings.json", "data.txt", "checkpoints", "metrics", "bad_files.txt", "summary.json",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images"].startswith("41 files, ")
    assert (summary["bad_files"], summary["epochs"]) == (1, 3)
    assert 0 < summary["data_wait"] < 1
    assert "light/text.jpg\tcannot identify image file" in (run / "bad_files.txt").read_text()
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["epoch=2.ckpt"]
    probes = saved(run / "checkpoints" / "epoch=2.ckpt")["callbacks"]["KNNProbeCallback"]["history"]
    assert [probe["epoch"] for probe in probes] == [0, 1, 2]
    assert probes[-1]["top1"] == 1.0  # light and dark


def start(*arguments, limit=None):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ, preexec_fn=limit
    )


def wait_for(file, process):
    """Until the file is there."""
    for _ in range(1200):
        if file.exists():
            return
        assert process.poll() is None, process.stdout.read()[-2000:]
        time.sleep(0.05)
    raise AssertionError(f"{file} did not appear")


@pytest.mark.parametrize("stop_with", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_it_ends_where_an_uninterrupted_run_ends(run, photos, tmp_path, stop_with):
    out = tmp_path / "out"
    process = start(*options(photos, out, 3))
    wait_for(out / "checkpoints" / "epoch=0.ckpt", process)
    process.send_signal(stop_with)
    process.communicate()
    assert (out / "checkpoints" / "interrupted.ckpt").exists() is (stop_with == signal.SIGINT)
    resumed = start("--resume", "--out", str(out))
    printed = resumed.communicate()[0]
    assert resumed.returncode == 0, printed[-2000:]
    one, other = (saved(folder / "checkpoints" / "epoch=2.ckpt")["state_dict"] for folder in (run, out))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_folder_that_changed_is_said_and_nothing_is_lost(photos, tmp_path):
    changed, out = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "out"
    main(options(changed, out, 1))
    before = (out / "checkpoints" / "epoch=0.ckpt").read_bytes()
    (changed / "dark" / "01.png").unlink()
    with pytest.raises(
        SystemExit, match=r"have changed since the run in .* began \(41 files, .*, now 40 files, .*put the files back"
    ):
        main(["--resume", "--out", str(out)])
    assert (out / "checkpoints" / "epoch=0.ckpt").read_bytes() == before


def test_a_full_disk_is_said_and_costs_no_checkpoint(photos, tmp_path):
    """A limit to the size of a file does what a full disk does: writing fails in the middle."""
    out = tmp_path / "out"
    process = start(*options(photos, out, 3, workers=0))
    first = out / "checkpoints" / "epoch=0.ckpt"
    wait_for(first, process)
    half = 10_000_000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (half, half))
    printed = process.communicate()[0]
    assert process.returncode == 1
    assert re.search(r"stopped: .*File too large.*Make room or repair, and go on with --resume --out", printed)
    assert "1 files could not be read and were skipped" in printed  # however it ends
    assert first.stat().st_size > half
    assert saved(first)["state_dict"]
    main(["--resume", "--out", str(out)])
    assert json.loads((out / "summary.json").read_text())["epochs"] == 3


def test_without_classes_there_is_no_probe(offline, tmp_path):
    data = ImageData(str(make_photos(tmp_path / "photos", classes=["all"])), workers=0)
    assert not data.has_classes
    data.setup("fit")
    assert (len(data.train), len(data.held_out)) == (41, 0)


def test_every_tenth_image_is_held_out_of_training(photos):
    data = ImageData(str(photos), workers=0)
    data.setup("fit")
    train, held_out = ({row["image"]["path"] for row in images.samples.rows} for images in (data.train, data.held_out))
    assert (len(train), len(held_out)) == (36, 5)
    assert not train & held_out
    assert set(data.held_out.samples.rows["label"]) == {0, 1}


def test_the_learning_rate_follows_the_linear_rule(photos, tmp_path):
    args = parse([*options(photos, tmp_path / "out", 100), "--batch-size", "32"])
    assert build(args, world_size=4).learning_rate == pytest.approx(5e-4 * 32 * 4 / 256)
    assert build(args).warmup_epochs == 10


@pytest.mark.parametrize(("change", "message"), [
    (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["--size", "huge"], "invalid choice: 'huge'"),
])  # fmt: skip
def test_what_cannot_work_stops_before_training(photos, tmp_path, change, message, capsys, monkeypatch):
    monkeypatch.setattr(fit_images.Trainer, "fit", lambda *args, **options: pytest.fail("training"))
    with pytest.raises((SystemExit, ValueError)) as caught:
        main([*options(photos, tmp_path / "out", 1), *change])
    assert message in str(caught.value) + capsys.readouterr().err


def test_a_backbone_that_cannot_take_local_views_is_found_before_training(photos, tmp_path, monkeypatch):
    def vit(*args, **options):
        backbone = backbones.vit(*args, **options)
        backbone.options = {}
        return backbone

    monkeypatch.setattr(fit_images, "vit", vit)
    monkeypatch.setattr(fit_images.Trainer, "fit", lambda *args, **options: pytest.fail("training"))
    with pytest.raises(ValueError, match="cannot take views of 16 x 16"):
        main(options(photos, tmp_path / "out", 1))


def test_a_stream_trains_and_goes_on(photos, tmp_path):
    """With the Trainer's limit_train_batches as the length of an epoch."""
    args = parse(options(photos, tmp_path / "out", 2))
    orders = []

    def fit(epochs, ckpt_path=None):
        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, index):
                orders.append((trainer.current_epoch, index, batch[0].float().mean().item()))

        data = StreamData(str(photos), batch_size=8, workers=0, image_size=36)
        own = {"max_epochs": epochs, "limit_train_batches": 3, "default_root_dir": tmp_path}
        run = trainer(TeacherUpdateCallback(total_steps=9), Watch(), **own)
        run.fit(build(args), data, ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "stream.ckpt")

    fit(3)
    whole, orders = orders, []
    fit(2)
    fit(3, tmp_path / "stream.ckpt")
    assert orders == whole
    assert len({mean for _, _, mean in whole}) == 9


def test_the_script_takes_a_stream(photos, tmp_path, capsys, monkeypatch):
    written, save = [], WholeCheckpoints.save_checkpoint
    monkeypatch.setattr(
        WholeCheckpoints, "save_checkpoint", lambda *args, **kw: written.append(args[2]) or save(*args, **kw)
    )
    main([*options(photos, tmp_path / "out", 2), "--stream", "2", "--momentum", "0.9"])
    assert [Path(file).name for file in written] == ["epoch=0.ckpt", "epoch=1.ckpt"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary.pop("data_wait") > 0
    assert summary == {"images": f"a stream from {photos}", "bad_files": 1, "epochs": 2}
    assert "1 files could not be read and were skipped" in capsys.readouterr().out
    checkpoint = saved(tmp_path / "out" / "checkpoints" / "epoch=1.ckpt")
    assert checkpoint["global_step"] == 4
    (receipt,) = [value["receipt"] for name, value in checkpoint["callbacks"].items() if "TeacherUpdate" in name]
    assert "last with momentum 0.985355," in receipt  # of the cosine from 0.9 to 1


def test_a_list_of_bad_files_begins_with_the_run(photos, tmp_path):
    args = parse(options(photos, tmp_path / "out", 1))
    (tmp_path / "bad_files.txt").write_text("of another run\tand its reason\n")
    data = ImageData(str(photos), batch_size=8, workers=0, image_size=36, eval_size=32)
    trainer(TeacherUpdateCallback(), max_epochs=1, default_root_dir=tmp_path).fit(build(args), data)
    assert data.bad_files.names() == []  # the one of these photos is held out, and nothing has read it


class Slow(Dataset):
    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.randn(32)


def test_waiting_is_measured_in_an_epoch_into_which_a_run_is_resumed(tmp_path):
    """Lightning does not call on_train_epoch_start there."""
    wait = DataWait()
    checkpoint = ModelCheckpoint(tmp_path, filename="inside", every_n_train_steps=2)
    trainer(checkpoint, max_epochs=1, limit_train_batches=3, enable_checkpointing=True).fit(
        BoringModel(), DataLoader(Slow(0.0))
    )
    run = trainer(wait, max_epochs=1, limit_train_batches=3)
    run.fit(BoringModel(), DataLoader(Slow(0.0)), ckpt_path=tmp_path / "inside.ckpt")
    assert run.global_step == 3
    assert 0 < wait.share < 1


@pytest.mark.parametrize(("seconds", "low", "high"), [(0.05, 0.7, 1.0), (0.0, 0.0, 0.6)])
def test_the_share_of_waiting_for_data(seconds, low, high):
    class Busy(BoringModel):
        def training_step(self, batch, batch_idx):
            time.sleep(0.01)
            return super().training_step(batch, batch_idx)

    wait = DataWait()
    run = trainer(wait, max_epochs=1)
    run.fit(Busy(), DataLoader(Slow(seconds)))
    assert low <= wait.share <= high
    assert run.callback_metrics["data_wait"].item() == pytest.approx(wait.share)


@pytest.mark.parametrize("option", [["--local-size", "17"], ["--global-size", "0"]])
def test_views_are_multiples_of_the_patches(photos, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        main([*options(photos, tmp_path / "out", 1), *option])
    assert f"must be a multiple of 16, the size of the ViT's patches, got {option[1]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    """Moved from another file system, as Lightning's are, it would grow in its place."""
    file = tmp_path / "a" / "one.ckpt"
    WholeCheckpoints().save_checkpoint({"state_dict": {}}, file)
    before, place = file.read_bytes(), file.stat().st_ino
    WholeCheckpoints().save_checkpoint({"state_dict": {}}, file)
    assert file.stat().st_ino != place  # another file was put there, not the same one written

    def half(self, checkpoint, path, storage_options=None):
        Path(path).write_bytes(before[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning.pytorch.plugins.io.TorchCheckpointIO.save_checkpoint", half)
    with pytest.raises(OSError, match="No space left"):
        WholeCheckpoints().save_checkpoint({"state_dict": {}}, file)
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [("one.ckpt", before)]
