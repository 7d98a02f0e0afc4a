import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from fit_digits import digits, main

from dino_head.callbacks import TeacherUpdateCallback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(text):
    """The code of the one block that holds the text."""
    (found,) = [block for block in BLOCKS if text in block]
    return compile(found, "README.md", "exec")


@pytest.fixture
def mine(tmp_path, monkeypatch, capsys):
    """What the block with the module leaves behind."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    exec(block("class Mine"), namespace)
    return namespace


def test_the_twenty_lines_run_and_print_what_the_readme_says(mine, capsys):
    printed = capsys.readouterr().out.strip().splitlines()[-1]  # behind the progress bar
    assert printed.startswith("student.head.last_layer frozen for 4 optimizer steps, bitwise unchanged")
    assert f"It prints `{printed}`." in README.replace("\n", " ")


def test_the_receipts_are_those_of_the_readme(mine, capsys):
    capsys.readouterr()
    exec(block("rules = ["), mine)
    printed = capsys.readouterr().out.strip().splitlines()[-4:]
    assert "\n".join(printed) in README


def test_a_rate_of_its_own_for_the_last_layer(mine):
    exec(block("import parameter_groups"), mine)
    rates = {id(p): group["lr"] for group in mine["optimizer"].param_groups for p in group["params"]}
    assert rates.pop(id(mine["head"].last_layer.weight_v)) == 1e-4
    assert set(rates.values()) == {5e-4}
    assert len(rates) == sum(p.requires_grad for p in mine["student"].parameters()) - 1


def test_the_checks_say_what_the_readme_says(mine, capsys):
    exec(block("def make():"), mine | {"TeacherUpdateCallback": TeacherUpdateCallback})
    printed = capsys.readouterr().out
    assert "one batch and 4 accumulated micro-batches differ at the end" in printed
    assert "batch norm (student.head.layers.1" in printed
    assert "an uninterrupted run and one resumed at an epoch's end differ at the end" in printed


def test_the_three_watch_and_write_a_page(mine, capsys, tmp_path):
    exec(block("watching = ["), mine)
    printed = capsys.readouterr().out
    names = set(re.findall(r"`((?:dino|knn)/\w+)`", README))
    assert len(names) == 8
    assert [name for name in names if name not in printed] == []
    assert "Too early to tell: a diagnosis needs 10 looks." in (tmp_path / "runs" / "mine" / "report.html").read_text()


def test_the_metrics_without_lightning(mine, capsys):
    exec(block("watching = ["), mine)
    capsys.readouterr()
    exec(block("from dino_head.metrics import"), mine)
    diagnosis, accuracy = capsys.readouterr().out.strip().splitlines()
    assert diagnosis == "None"
    assert accuracy.startswith("tensor(0.")


def test_a_checkpoint_and_a_folder_of_images_become_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--epochs", "1", "--batch-size", "256", "--prototypes", "16"])  # to the default folder, runs/digits
    (tmp_path / "images").mkdir()
    for index, (image, _) in enumerate(zip(*digits(size=8)[1], strict=True)):
        if index < 5:
            plt.imsave(tmp_path / "images" / f"{index}.png", image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    namespace: dict[str, object] = {}
    from_array, from_folder = [block for block in BLOCKS if "features = torch.cat" in block]
    exec(compile(from_array, "README.md", "exec"), namespace)
    all_features = namespace["features"]
    assert all_features.shape == (397, 128)
    exec(compile(from_folder, "README.md", "exec"), namespace)
    assert namespace["features"].shape == (5, 128)
    assert namespace["features"].isfinite().all()


def test_no_python_block_is_left_out():
    assert len(BLOCKS) == 8


def test_the_table_of_guarantees_names_tests_that_exist():
    source = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(set(named)) >= 30
    assert [name for name in named if f"def {name}(" not in source] == []


PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?://)([^)#]+)\)", PROSE))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
