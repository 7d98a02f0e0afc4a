import io
import json

import pytest
import torch
from helpers.pictures import BAD, GOOD, RED, picture

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
