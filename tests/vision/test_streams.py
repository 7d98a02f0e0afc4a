import itertools
import os

import pytest
import torch
from helpers.pictures import BAD, GOOD, picture
from torch.utils.data import DataLoader

from dino_head.vision.files import BadFiles
from dino_head.vision.images import open_images
from dino_head.vision.streams import ImageStream

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*fork.*")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_shuffled_in_each_epoch_and_skips_bad_files(tmp_path, workers):
    for level in range(0, 240, 20):
        picture(color=(level, level, level)).save(tmp_path / f"{level}.png")
    for name, write in BAD.items():
        write(tmp_path / name.replace(" ", "_"))
    bad_files = BadFiles(tmp_path.parent / f"{workers}.txt")
    stream = ImageStream(open_images(str(tmp_path), streaming=True), 16, bad_files)
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


def test_processes_divide_an_endless_stream(tree, tmp_path):
    rows = open_images(str(tree), streaming=True)
    bad_files = BadFiles(tmp_path / "bad.txt")
    parts = []
    for rank in range(2):
        stream = ImageStream(rows, 16, bad_files, rank, 2)
        seen = []
        stream.images.sample = lambda row, seen=seen: seen.append(row["image"]["path"])
        assert len([*itertools.islice(stream, 20)]) == 20
        parts.append({*seen})
    assert len(parts[0] | parts[1]) == len(GOOD) + len(BAD)
    assert not parts[0] & parts[1]


def test_a_stream_of_bad_files_alone_raises(tmp_path):
    for name, write in BAD.items():
        write(tmp_path / name.replace(" ", "_"))
    with pytest.raises(ValueError, match=r"none of 5 images can be decoded: .*bad\.txt"):
        next(iter(ImageStream(open_images(str(tmp_path), streaming=True), 16, BadFiles(tmp_path / "bad.txt"))))


def test_a_stream_reads_names_that_are_not_utf8(tmp_path):
    for name in (b"caf\xe9.png", b"b\xe9d.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            picture().save(file, "PNG")
    (tmp_path / "b\udce9d.png").write_text("no image")
    bad_files = BadFiles(tmp_path.parent / "bad.txt")
    stream = ImageStream(open_images(str(tmp_path), streaming=True), 16, bad_files, background="black")
    images, _ = next(iter(DataLoader(stream, batch_size=2, num_workers=1)))
    assert images.shape == (2, 3, 16, 16)
    assert bad_files.names() == [f"{tmp_path}/b\\udce9d.png"]
