import pytest
from helpers.pictures import BAD, GOOD


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tree(tmp_path):
    """Good and bad files of two classes."""
    root = tmp_path / "photos"
    for number, (name, write) in enumerate([*GOOD.items(), *BAD.items()]):
        folder = root / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / name.replace(" ", "_"))
    (root / "cats" / "notes.txt").write_text("no image, by its name")
    return root
