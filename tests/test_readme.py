import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from fit_digits import digits, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_twenty_lines_run_and_print_what_the_readme_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in BLOCKS if "class Mine" in block]
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.strip().splitlines()[-1]  # behind the progress bar
    assert printed.startswith("student.head.last_layer frozen for 4 optimizer steps, bitwise unchanged")
    assert f"It prints `{printed}`." in README.replace("\n", " ")


def test_a_checkpoint_and_a_folder_of_images_become_features(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--epochs", "1", "--batch-size", "256", "--prototypes", "16"])  # to the default folder, runs/digits
    (tmp_path / "images").mkdir()
    for index, (image, _) in enumerate(zip(*digits(size=8)[1], strict=True)):
        if index < 5:
            plt.imsave(tmp_path / "images" / f"{index}.png", image[0].numpy(), cmap="gray", vmin=0, vmax=1)
    namespace: dict[str, object] = {}
    from_array, from_folder = [block for block in BLOCKS if "features = " in block]
    exec(compile(from_array, "README.md", "exec"), namespace)
    all_features = namespace["features"]
    assert all_features.shape == (397, 128)
    exec(compile(from_folder, "README.md", "exec"), namespace)
    assert namespace["features"].shape == (5, 128)
    assert namespace["features"].isfinite().all()


def test_no_python_block_is_left_out():
    assert len(BLOCKS) == 3


def test_the_table_of_guarantees_names_tests_that_exist():
    source = (ROOT / "tests" / "callbacks" / "test_freeze_last_layer.py").read_text()
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 14
    assert [name for name in named if f"def {name}(" not in source] == []


PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?://)([^)#]+)\)", PROSE))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
