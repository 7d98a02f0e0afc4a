import io
import json
import os

import pytest
import torch
from helpers.pictures import BAD, GOOD, RED, picture
from PIL import Image

from dino_head.vision import imagenet
from dino_head.vision.images import Images, image_paths, open_images

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_labels_are_the_folders(tree):
    rows = open_images(str(tree))
    assert rows.features["label"].names == ["cats", "dogs"]
    for row in rows:
        assert f"/{rows.features['label'].names[row['label']]}/" in row["image"]["path"]


@pytest.mark.parametrize("name", ["train_1.png", "val/1.png", "test/a/1.png", "a b/[1]#é.PNG", "a::b/1.png"])
def test_every_name_of_an_image_is_found(tree, name):
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    picture().save(tree / name, "PNG")
    (tree / "metadata.csv").write_text("file_name\nnothing.png\n")
    (tree / ".hidden.jpg").touch()
    (tree / "archive.zip").touch()
    rows = open_images(str(tree))
    assert len(rows) == len(GOOD) + len(BAD) + 1
    assert str(tree / name) in image_paths(rows)
    (tree / "again").symlink_to(tree)  # without end
    (tree.parent / "elsewhere").mkdir()
    picture().save(tree.parent / "elsewhere" / "linked.png")
    (tree / "link").symlink_to(tree.parent / "elsewhere")
    (added,) = {*image_paths(open_images(str(tree)))} - {*image_paths(rows)}
    assert added == str(tree / "link" / "linked.png")


NAMES = [b"caf\xe9_sm.png", b"ni\xf1o/a.png", b"\xff\xfe.PNG", b"a\n\t.png", "\U0001f600 é.png".encode()]


def write_names(root):
    """Images with the names, in a folder whose name is not UTF-8."""
    files = [os.fsdecode(os.path.join(os.fsencode(root), b"\xe9t\xe9", name)) for name in NAMES]
    for file in files:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "wb") as opened:
            picture().save(opened, "PNG")
    return sorted(files)


def test_names_that_are_not_utf8_are_read_like_all_others(tmp_path):
    files = write_names(tmp_path)
    rows = open_images(str(tmp_path))
    assert image_paths(rows) == files
    images = Images(rows, 16)
    assert [images.name(index) for index in range(len(files))] == files
    assert rows.features["label"].names == ["\\udce9t\\udce9", "ni\\udcf1o"]
    for index, file in enumerate(files):
        pixels, label = images[index]
        assert (pixels.float().mean(dim=(1, 2)) - torch.tensor(RED)).abs().max() < 2
        assert label == int("\udcf1" in file)


def test_the_root_may_be_a_folder_that_is_not_utf8(tmp_path):
    write_names(tmp_path)
    root = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xe9t\xe9"))
    assert len(image_paths(open_images(root))) == len(NAMES)


def test_files_without_extension_are_images_if_they_begin_like_one(tmp_path, caplog):
    for folder, kind in (("a", "JPEG"), ("a", "PNG"), ("b", "WEBP"), ("b", "GIF"), ("b", "TIFF"), ("b", "BMP")):
        (tmp_path / folder).mkdir(exist_ok=True)
        picture().save(tmp_path / folder / f"hash{kind}", kind)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "LICENSE").write_text("P1 is no image")
    (tmp_path / "docs" / "empty").touch()
    (tmp_path / "b" / "truncated").write_bytes((tmp_path / "a" / "hashPNG").read_bytes()[:50])
    for index in range(3):
        (tmp_path / "a" / f"{index}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "a" / "caf\udce9.\udce9").touch()
    with caplog.at_level("INFO"):
        rows = open_images(str(tmp_path))
    assert [os.path.basename(path) for path in image_paths(rows)] == [
        "hashJPEG", "hashPNG", "hashBMP", "hashGIF", "hashTIFF", "hashWEBP", "truncated",
    ]  # fmt: skip
    assert rows.features["label"].names == ["a", "b"]  # no class for the license
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (f"{tmp_path}: 7 of 13 files are used. Not used: 3 .heic, 2 without extension, 1 .\\udce9")


def test_many_extensions_are_counted_in_one_line(tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    for index in range(20):
        (tmp_path / f"a.{index:02}").touch()
    with caplog.at_level("INFO"):
        open_images(str(tmp_path))
    assert caplog.messages[0].endswith(
        ": 1 of 21 files are used. Not used: 1 .00, 1 .01, 1 .02, 1 .03, 1 .04, 1 .05, 14 with other extensions"
    )


def test_a_folder_whose_files_are_all_used_logs_nothing(tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    with caplog.at_level("INFO"):
        open_images(str(tmp_path))
    assert not caplog.messages


def test_the_background_reaches_the_images_and_a_wrong_one_raises(tmp_path):
    Image.new("RGBA", (16, 16)).save(tmp_path / "a.png")
    rows = open_images(str(tmp_path))
    assert Images(rows, 16)[0][0].eq(255).all()
    assert Images(rows, 16, background="black")[0][0].eq(0).all()
    with pytest.raises(ValueError, match="unknown color specifier"):
        Images(rows, 16, background="blak")


def test_data_that_is_not_a_folder_of_images_raises(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"a\.jpg is a file, expected a folder of images or the name of a data set"):
        open_images(str(tmp_path / "a.jpg"))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.jsonl").write_text(json.dumps({"text": "a", "n": 1}))
    import datasets

    table = datasets.load_dataset("json", data_files=str(tmp_path / "table" / "a.jsonl"), split="train")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: table)
    with pytest.raises(ValueError, match="someone/texts has no column of images, only text, n"):
        open_images("someone/texts")


def test_an_unknown_name_raises(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="photoz is neither a folder nor a data set on the Hub that can be read"):
        open_images("photoz")


def test_a_folder_without_images_raises(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"has no file with the extension of an image \(\.\w+, "):
        open_images(str(tmp_path))


def test_a_data_set_of_the_hub_with_images_in_its_table(tmp_path, monkeypatch):
    """Without network: a table like the Hub's, which holds the files' bytes, in columns of other names."""
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
    assert image_paths(images.rows) == [None] * 3


def test_normalize_uses_the_statistics_of_imagenet():
    image = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(imagenet.normalize(image).mean(dim=(1, 2)), expected)
