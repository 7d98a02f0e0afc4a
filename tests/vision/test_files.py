from collections import defaultdict

import pytest
import torch
from helpers.pictures import BAD, GOOD, RED
from torch.utils.data import DataLoader

from dino_head.vision.files import BadFiles, ReplaceUnreadable, fingerprint
from dino_head.vision.images import Images, open_images

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*fork.*")


def readable(folder, size=16):
    """The list of bad files is in a folder that does not exist yet."""
    return ReplaceUnreadable(Images(open_images(str(folder)), size), BadFiles(folder.parent / "run" / "bad_files.txt"))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_counted_and_listed(tree, workers):
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
    assert images.bad_files.file.read_text() == written  # known bad files are not opened again


def test_a_file_that_disappears_is_a_bad_file(tree):
    images = readable(tree)
    for file in tree.rglob("jpeg.jpg"):
        file.unlink()
    assert len([images[index] for index in range(len(images))]) == len(images)
    assert any(file.endswith("jpeg.jpg") for file in images.bad_files.names())


def test_the_cost_of_a_sample_does_not_depend_on_the_number_of_images(tree):
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


def test_a_folder_of_bad_files_alone_raises(tmp_path):
    for name, write in BAD.items():
        write(tmp_path / name.replace(" ", "_"))
    with pytest.raises(ValueError, match=r"none of 5 files can be read: .*bad_files\.txt"):
        readable(tmp_path)[0]


@pytest.mark.parametrize("name", ["a\nb.jpg", "caf\u00e9.jpg", "\udcff.jpg", "'.jpg", "a\\b.jpg"])
def test_any_name_is_listed_in_one_line(name, tmp_path):
    bad_files = BadFiles(tmp_path / "bad.txt")
    bad_files.add(name, ValueError("1\n2"))
    bad_files.add("other", OSError())
    bad_files.add(name, ValueError("other"))
    names = bad_files.names()
    assert len(names) == 2
    (line,) = {*names} - {"other"}
    assert line.isascii()


def test_the_fingerprint_of_a_folder_is_that_of_earlier_versions():
    """Otherwise a run that an earlier version started could not be resumed."""
    assert fingerprint(["photos/a/é 1.png", "photos/b/2.jpg"]) == "2 files, c5a92e6f0b55b6e8"
    assert fingerprint(["photos/caf\udce9.png"]).startswith("1 files, ")


def test_a_fingerprint_depends_on_the_files_and_their_order():
    assert fingerprint(["a", "b"]).startswith("2 files, ")
    assert fingerprint(["a", "b"]) == fingerprint(["a", "b"])
    assert len({fingerprint(files) for files in (["a", "b"], ["a", "c"], ["b", "a"], ["a"])}) == 4
