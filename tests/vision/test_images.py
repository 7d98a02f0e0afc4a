import io
import itertools
import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dino_head.vision.files import BadFiles, Readable
from dino_head.vision.images import Images, Stream, decode, normalized, open_images, paths

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*fork.*")
RED = (250, 10, 10)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(mode="RGB", size=(48, 32), color=RED, **options):
    return Image.new("RGB", size, color).convert(mode, **options)


def grey16():
    return Image.fromarray(np.linspace(0, 4095, 48 * 32).reshape(32, 48).astype(np.uint16))  # of a 12-bit camera


def half(size=(48, 32)):
    """Red on the left, black on the right."""
    image = Image.new("RGB", size)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image


def rotated(file):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    half().save(file, exif=exif)


def truncated(file):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(data, "JPEG")
    file.write_bytes(data.getvalue()[: data.tell() // 2])


GOOD = {
    "jpeg": lambda file: picture().save(file.with_suffix(".jpg")),
    "png": lambda file: picture().save(file.with_suffix(".png")),
    "cmyk": lambda file: picture("CMYK").save(file.with_suffix(".jpg")),
    "palette": lambda file: picture("P").save(file.with_suffix(".png")),
    "transparent": lambda file: picture("RGBA").save(file.with_suffix(".png")),
    "gif": lambda file: picture("P").save(file.with_suffix(".gif")),
}
BAD = {
    "truncated": lambda file: truncated(file.with_suffix(".jpg")),
    "zero bytes": lambda file: file.with_suffix(".jpg").touch(),
    "text": lambda file: file.with_suffix(".jpg").write_text("no image"),
    "1 x 1": lambda file: picture(size=(1, 1)).save(file.with_suffix(".png")),
    "web page": lambda file: file.with_suffix(".png").write_text("<html>"),
}


def written(write, folder):
    write(folder / "image")
    (file,) = folder.iterdir()
    return str(file)


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_image_becomes_bytes_of_one_size(kind, tmp_path):
    image = decode(written(GOOD[kind], tmp_path), 16)
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)
    assert (image.float().mean(dim=(1, 2)) - torch.tensor(RED)).abs().max() < 8


def test_16_bits_are_stretched_to_8(tmp_path):
    image = decode(written(lambda file: grey16().save(file.with_suffix(".tif")), tmp_path), 32)
    assert image.min() < 10
    assert image.max() > 245
    assert image[0, -1].float().mean() > image[0, 0].float().mean() + 150


def test_a_photo_is_turned_as_its_camera_was(tmp_path):
    image = decode(written(lambda file: rotated(file.with_suffix(".jpg")), tmp_path), 16).float()
    assert image[0, :6].mean() > 200  # red is on top now
    assert image[0, -6:].mean() < 50


def test_the_middle_of_the_shorter_side_is_taken():
    data = io.BytesIO()
    half((320, 80)).save(data, "PNG")
    image = decode(data.getvalue(), 40).float()
    assert image[0, :, :18].mean() > 240
    assert image[0, :, -18:].mean() < 10


def test_a_large_jpeg_is_decoded_small(tmp_path, monkeypatch):
    sizes = []
    fit = decode.__globals__["ImageOps"].fit
    monkeypatch.setattr("images.ImageOps.fit", lambda image, *args: sizes.append(image.size) or fit(image, *args))
    decode(written(lambda file: picture(size=(1600, 1200)).save(file.with_suffix(".jpg")), tmp_path), 100)
    assert sizes == [(200, 150)]


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_one_by_one(kind, tmp_path):
    with pytest.raises((OSError, ValueError)):
        decode(written(BAD[kind], tmp_path), 16)


@pytest.fixture
def tree(tmp_path):
    """Two classes, one of them with a folder of its own, good files and bad ones."""
    root = tmp_path / "photos"
    for number, (name, write) in enumerate([*GOOD.items(), *BAD.items()]):
        folder = root / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / name.replace(" ", "_"))
    (root / "cats" / "notes.txt").write_text("no image, by its name")
    return root


def readable(folder, size=16):
    """Its list of bad files is in a folder that is not there yet."""
    return Readable(Images(open_images(str(folder)), size), BadFiles(folder.parent / "run" / "bad_files.txt"))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_in_a_tree_are_replaced_counted_and_listed(tree, workers):
    images = readable(tree)
    assert len(images) == len(GOOD) + len(BAD)
    batches = [*DataLoader(images, batch_size=3, num_workers=workers)]
    assert sum(len(batch) for batch, _ in batches) == len(images)
    for batch, labels in batches:
        assert ((batch.float().mean(dim=(2, 3)) - torch.tensor(RED)).abs().amax(dim=1) < 8).all()
        assert set(labels.tolist()) <= {0, 1}
    assert {file.rsplit("/", 1)[1].split(".")[0] for file in images.bad_files.names()} == {
        name.replace(" ", "_") for name in BAD
    }
    written = images.bad_files.file.read_text()
    assert len([*DataLoader(images, batch_size=3, num_workers=workers)]) == len(batches)
    assert images.bad_files.file.read_text() == written  # what is known as bad is not opened again


def test_labels_are_the_folders(tree):
    rows = open_images(str(tree))
    assert rows.features["label"].names == ["cats", "dogs"]
    for row in rows:
        assert f"/{rows.features['label'].names[row['label']]}/" in row["image"]["path"]


def test_a_file_that_disappears_is_a_bad_one(tree):
    images = readable(tree)
    for file in tree.rglob("jpeg.jpg"):
        file.unlink()
    assert len([images[index] for index in range(len(images))]) == len(images)
    assert any(file.endswith("jpeg.jpg") for file in images.bad_files.names())


def test_a_sample_costs_the_same_among_however_many_images(tree):
    class Endless(list):
        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            return good

    rows = open_images(str(tree))
    (good,) = [row for row in rows if row["image"]["path"].endswith("jpeg.jpg")]
    images = readable(tree)
    images.samples.rows, images.bad = Endless(), defaultdict(bool)
    assert images[10**9][0].shape == (3, 16, 16)  # a list of indices would not fit into any memory


def test_only_bad_files_are_an_error(tmp_path):
    for name, write in BAD.items():
        write(tmp_path / name.replace(" ", "_"))
    with pytest.raises(ValueError, match=r"not one of 5 files can be read; they are listed in .*bad_files\.txt"):
        readable(tmp_path)[0]


def test_what_is_no_folder_of_images(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"a\.jpg is a file, expected a folder of images or the name of a data set"):
        open_images(str(tmp_path / "a.jpg"))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.jsonl").write_text(json.dumps({"text": "a", "n": 1}))
    import datasets

    table = datasets.load_dataset("json", data_files=str(tmp_path / "table" / "a.jsonl"), split="train")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: table)
    with pytest.raises(ValueError, match="someone/texts has no column of images, but text, n"):
        open_images("someone/texts")


def test_a_data_set_of_the_hub_has_its_images_in_memory_mapped_tables(tmp_path, monkeypatch):
    """Without network: a table such as the Hub's, with the files' bytes in it and columns of other names."""
    import datasets

    data = [io.BytesIO() for _ in range(3)]
    for file in data:
        picture().save(file, "PNG")
    features = {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=["a", "b"]),
        "id": datasets.Value("int64"),
    }
    rows = {"img": [{"bytes": f.getvalue(), "path": None} for f in data], "fine_label": [0, 1, 1], "id": [7, 8, 9]}
    table = datasets.Dataset.from_dict(rows, datasets.Features(features))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: table)
    images = Images(open_images("someone/pictures"), 16)
    assert [images[index][1] for index in range(3)] == [0, 1, 1]
    assert (images[0][0].float().mean(dim=(1, 2)) - torch.tensor(RED)).abs().max() < 2
    assert paths(images.rows) == [None] * 3


def test_the_probe_sees_what_the_views_are_like():
    image = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(normalized(image).mean(dim=(1, 2)), expected)


@pytest.mark.parametrize("name", ["a\nb.jpg", "caf\u00e9.jpg", "\udcff.jpg", "'.jpg", "a\\b.jpg"])
def test_a_name_is_a_line_whatever_characters_it_has(name, tmp_path):
    bad_files = BadFiles(tmp_path / "bad.txt")
    bad_files.add(name, ValueError("1\n2"))
    bad_files.add("other", OSError())
    bad_files.add(name, ValueError("other"))
    names = bad_files.names()
    assert len(names) == 2
    (line,) = {*names} - {"other"}
    assert line.isascii()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_shuffled_anew_in_each_epoch_and_passes_bad_files_by(tmp_path, workers):
    for level in range(0, 240, 20):
        picture(color=(level, level, level)).save(tmp_path / f"{level}.png")
    for name, write in BAD.items():
        write(tmp_path / name.replace(" ", "_"))
    bad_files = BadFiles(tmp_path.parent / f"{workers}.txt")
    stream = Stream(open_images(str(tmp_path), streaming=True), 16, bad_files)
    orders = []
    for epoch in (0, 1, 0):
        stream.rows.set_epoch(epoch)
        loader = itertools.islice(DataLoader(stream, batch_size=2, num_workers=workers), 6)
        batches = [images for images, _ in loader]
        orders.append(torch.cat(batches)[:, 0, 0, 0].tolist())
    assert [sorted(order) for order in orders] == [[*range(0, 240, 20)]] * 3
    assert orders[0] == orders[2] != orders[1]
    assert len(bad_files.names()) == len(BAD)
    assert all(name.startswith(str(tmp_path)) for name in bad_files.names())


def test_processes_divide_a_stream_and_none_ends_before_the_others(tree, tmp_path):
    rows = open_images(str(tree), streaming=True)
    bad_files = BadFiles(tmp_path / "bad.txt")
    parts = []
    for rank in range(2):
        stream = Stream(rows, 16, bad_files, rank, 2)
        seen = []
        stream.images.sample = lambda row, seen=seen: seen.append(row["image"]["path"])
        assert len([*itertools.islice(stream, 20)]) == 20
        parts.append({*seen})
    assert len(parts[0] | parts[1]) == len(GOOD) + len(BAD)
    assert not parts[0] & parts[1]


def test_a_stream_of_bad_files_alone_is_an_error(tmp_path):
    for name, write in BAD.items():
        write(tmp_path / name.replace(" ", "_"))
    with pytest.raises(ValueError, match=r"not one of 5 images can be decoded; they are listed in .*bad\.txt"):
        next(iter(Stream(open_images(str(tmp_path), streaming=True), 16, BadFiles(tmp_path / "bad.txt"))))


@pytest.mark.parametrize("name", ["train_1.png", "val/1.png", "test/a/1.png", "a b/[1]#é.PNG", "a::b/1.png"])
def test_no_image_is_left_out_for_its_name(tree, name):
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    picture().save(tree / name, "PNG")
    (tree / "metadata.csv").write_text("file_name\nnothing.png\n")
    (tree / ".hidden.jpg").touch()
    (tree / "archive.zip").touch()
    rows = open_images(str(tree))
    assert len(rows) == len(GOOD) + len(BAD) + 1
    assert str(tree / name) in paths(rows)
    (tree / "again").symlink_to(tree)  # without end
    (tree.parent / "elsewhere").mkdir()
    picture().save(tree.parent / "elsewhere" / "linked.png")
    (tree / "link").symlink_to(tree.parent / "elsewhere")
    (added,) = {*paths(open_images(str(tree)))} - {*paths(rows)}
    assert added == str(tree / "link" / "linked.png")


@pytest.mark.parametrize("missing", [np.nan, np.inf, -3.4e38])
def test_pixels_that_are_missing_do_not_darken_the_others(missing, tmp_path):
    pixels = np.linspace(0, 1e-3, 64 * 64, dtype=np.float32).reshape(64, 64)
    pixels[0] = missing
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    image = decode(str(tmp_path / "a.tif"), 64).float()
    assert image[0, -4:].mean() > 230
    assert 100 < image[0, 30:34].mean() < 155
    assert image[0, 2:6].mean() < 20


def test_a_name_that_is_nowhere():
    with pytest.raises(ValueError, match="photoz is no folder here, and no data set on the Hub that can be read"):
        open_images("photoz")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="has no file that is called as an image"):
        open_images(str(tmp_path))
