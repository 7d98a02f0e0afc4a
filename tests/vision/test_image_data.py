from types import SimpleNamespace

import pytest
import torch
from helpers.photos import make_photos
from PIL import Image

from dino_head.vision import ImageData, StreamData, imagenet


def test_every_tenth_image_is_held_out_of_training(tmp_path):
    data = ImageData(str(make_photos(tmp_path / "photos")), workers=0)
    data.setup("fit")
    train, held_out = ({row["image"]["path"] for row in images.samples.rows} for images in (data.train, data.held_out))
    assert (len(train), len(held_out)) == (36, 5)
    assert not train & held_out
    assert set(data.held_out.samples.rows["label"]) == {0, 1}


def test_without_classes_no_image_is_held_out(tmp_path):
    data = ImageData(str(make_photos(tmp_path / "photos", classes=["all"])), workers=0)
    assert not data.has_classes
    data.setup("fit")
    assert (len(data.train), len(data.held_out)) == (41, 0)


def test_a_stream_takes_the_length_of_an_epoch_from_the_trainer(tmp_path):
    data = StreamData(str(make_photos(tmp_path / "photos")), batch_size=8, workers=0, image_size=16)
    data.trainer = SimpleNamespace(
        limit_train_batches=1.0, default_root_dir=tmp_path, world_size=1, global_rank=0, current_epoch=0,
        fit_loop=SimpleNamespace(batch_idx=-1, is_resuming=False),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"limit_train_batches=1\.0: set it in the Trainer to the number of batches"):
        data.train_dataloader()
    data.trainer.limit_train_batches = 3
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, labels.shape) == ((8, 3, 16, 16), (8,))


def test_a_folder_whose_names_are_not_utf8(tmp_path, capsys):
    """Description, labels, workers, loaders for the kNN accuracy, stream and the list of bad files."""
    photos = make_photos(tmp_path / "ph\udcf6tos", classes=["ni\udcf1o", "caf\udce9"])
    trainer = SimpleNamespace(
        default_root_dir=tmp_path / "r\udcfcn", world_size=1, global_rank=0, current_epoch=0, limit_train_batches=3,
        fit_loop=SimpleNamespace(batch_idx=-1), is_global_zero=True, ckpt_path=None,
    )  # fmt: skip
    data = ImageData(str(photos), batch_size=8, workers=1, image_size=16, eval_size=16)
    assert data.description.startswith("41 files, ")
    assert data.has_classes
    data.trainer = trainer
    data.setup("fit")
    assert len([*data.train_dataloader()]) == 4
    assert [len([*loader]) for loader in data.knn_dataloaders()] == [5, 1]
    data.teardown("fit")
    assert capsys.readouterr().out == f"1 unreadable file skipped: {tmp_path}/r\\udcfcn/bad_files.txt\n"
    stream = StreamData(str(photos), batch_size=8, workers=1, image_size=16)
    assert stream.description == f"a stream from {tmp_path}/ph\\udcf6tos"
    stream.trainer = trainer
    assert next(iter(stream.train_dataloader()))[0].shape == (8, 3, 16, 16)


def test_all_loaders_show_the_background(tmp_path):
    for number in range(4):
        (tmp_path / "photos" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (16, 16)).save(tmp_path / "photos" / f"{number % 2}" / f"{number}.png")
    options = {"batch_size": 1, "workers": 0, "image_size": 16, "background": "#ff0000"}
    data = ImageData(str(tmp_path / "photos"), eval_size=16, **options)
    stream = StreamData(str(tmp_path / "photos"), **options)
    trainer = SimpleNamespace(
        default_root_dir=tmp_path, world_size=1, global_rank=0, current_epoch=0, limit_train_batches=3,
        fit_loop=SimpleNamespace(batch_idx=-1), is_global_zero=True, ckpt_path=None,
    )  # fmt: skip
    data.trainer = stream.trainer = trainer
    data.setup("fit")
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 16, 16)
    for loader in (data.train_dataloader(), stream.train_dataloader()):
        assert torch.equal(next(iter(loader))[0][0], red)
    for loader in data.knn_dataloaders():
        torch.testing.assert_close(next(iter(loader))[0][0], imagenet.normalize(red))
