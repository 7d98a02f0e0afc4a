import argparse
import itertools
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import dino_head
import dino_head.callbacks
from dino_head import DINOProjectionHead
from dino_head.callbacks import TeacherUpdateCallback
from dino_head.checkpoints import export_head
from dino_head.examples import fit_digits
from dino_head.examples.fit_digits import digits, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE]


def blocks(page):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


# Pages whose blocks need something to be there first have tests of their own; README.md's are run one by one.
ALONE = [page for page in SITE if blocks(page) and page.stem not in {"weights", "guarantees"}]
ON_README = {"README.md": 6, "guarantees.md": 1}  # and how many there are


def block(text):
    """The code of the one block that holds the text, of those that stand on README.md's module."""
    code = [code for page in PAGES if page.name in ON_README for code in blocks(page)]
    (found,) = [code for code in code if text in code]
    return compile(found, "README.md", "exec")


@pytest.fixture
def mine(tmp_path, monkeypatch, capsys):
    """What the block with the module leaves behind."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    exec(block("class Mine"), namespace)
    return namespace


@pytest.mark.slow
def test_the_twenty_lines_run_and_print_what_the_readme_says(mine, capsys):
    printed = capsys.readouterr().out.strip().splitlines()[-1]  # behind the progress bar
    assert printed.startswith("student.head.last_layer frozen for 4 optimizer steps, bitwise unchanged")
    assert f"It prints `{printed}`." in README.replace("\n", " ")


@pytest.mark.slow
def test_the_receipts_are_those_of_the_readme(mine, capsys):
    capsys.readouterr()
    exec(block("rules = ["), mine)
    printed = capsys.readouterr().out.strip().splitlines()[-4:]
    assert "\n".join(printed) in README


@pytest.mark.slow
def test_a_rate_of_its_own_for_the_last_layer(mine):
    exec(block("import parameter_groups"), mine)
    rates = {id(p): group["lr"] for group in mine["optimizer"].param_groups for p in group["params"]}
    assert rates.pop(id(mine["head"].last_layer.weight_v)) == 1e-4
    assert set(rates.values()) == {5e-4}
    assert len(rates) == sum(p.requires_grad for p in mine["student"].parameters()) - 1


@pytest.mark.slow
def test_the_checks_say_what_the_readme_says(mine, capsys):
    exec(block("def make():"), mine | {"TeacherUpdateCallback": TeacherUpdateCallback})
    printed = capsys.readouterr().out
    assert "one batch and 4 accumulated micro-batches differ at the end" in printed
    assert "batch norm (student.head.layers.1" in printed
    assert "an uninterrupted run and one resumed at an epoch's end differ at the end" in printed


@pytest.mark.slow
def test_the_three_watch_and_write_a_page(mine, capsys, tmp_path):
    exec(block("watching = ["), mine)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "mine" / "curves.json").read_text())["looks"]
    names = set(re.findall(r"`((?:dino|knn)/\w+)`", README))
    assert len(names) == 8
    assert [name for name in names if name not in printed] == []
    assert "Too early to tell: a diagnosis needs 10 looks." in (tmp_path / "runs" / "mine" / "report.html").read_text()


@pytest.mark.slow
def test_the_metrics_without_lightning(mine, capsys):
    exec(block("watching = ["), mine)
    capsys.readouterr()
    exec(block("from dino_head.metrics import"), mine)
    diagnosis, accuracy = capsys.readouterr().out.strip().splitlines()
    assert diagnosis == "None"
    assert accuracy.startswith("tensor(0.")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    main(["--epochs", "1", "--batch-size", "256", "--prototypes", "16", "--out", str(out)])
    return out


@pytest.fixture
def beside_a_digits_run(digits_run, tmp_path, monkeypatch):
    """A folder with a short run where the example writes it by default."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits_run, tmp_path / "runs" / "digits")


@pytest.mark.slow
def test_a_head_out_of_a_checkpoint(beside_a_digits_run):
    exec(block("import export_head"), {})
    assert torch.load("runs/head.pth", weights_only=True)["last_layer.weight_v"].shape == (16, 64)


@pytest.mark.slow
def test_the_page_of_weights(beside_a_digits_run, tmp_path, capsys):
    """Every block of it, from the first to the last."""
    page = (ROOT / "docs" / "weights.md").read_text()
    (tmp_path / "images").mkdir()
    for index, (picture, _) in enumerate(zip(*digits(size=8)[1], strict=True)):
        if index < 5:
            plt.imsave(tmp_path / "images" / f"{index}.png", picture[0].numpy(), cmap="gray", vmin=0, vmax=1)
    theirs = export_head(DINOProjectionHead(6, 8, 4, 12, batch_norm=False), "dino")
    sides = {"student": {f"module.head.{key}": value for key, value in theirs.items()}}
    sides["teacher"] = {f"head.{key}": value for key, value in theirs.items()}
    sides["teacher"]["backbone.norm.weight"] = torch.ones(3)
    center = {"dino_loss": {"center": torch.randn(1, 65536)}}
    torch.save({**sides, **center, "args": argparse.Namespace()}, "dino_vitbase16_pretrain_full_checkpoint.pth")
    torch.save({"teacher": sides["teacher"] | {"head.last_layer2.weight_g": torch.ones(2)}}, "ibot.pth")
    sequential = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4), nn.Identity()]
    sequential = nn.Sequential(*sequential, nn.Linear(4, 12, bias=False))
    flat = {f"projector.teacher.{key}": value for key, value in sequential.state_dict().items()}
    torch.save({"state_dict": flat | {"backbone.teacher.norm.weight": torch.ones(3)}}, "stable_pretraining.ckpt")
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 9
    shapes = []
    for code in blocks:
        exec(compile(code, "weights.md", "exec"), namespace)
        if "projector.teacher" in code:
            x = torch.randn(5, 6)
            expected = sequential[-1](nn.functional.normalize(sequential[:-1](x), dim=-1))
            torch.testing.assert_close(namespace["projector"](x), expected)
            assert torch.equal(namespace["head"].last_layer.weight_v, theirs["last_layer.weight_v"])
        if "dino_loss" in code:
            assert torch.equal(namespace["loss"].center[0], center["dino_loss"]["center"])
            assert namespace["weights"].keys() == {"norm.weight"}
        if "features" in code and "images" in namespace:
            assert namespace["features"].isfinite().all()
            shapes.append(tuple(namespace["features"].shape))
    assert shapes[:2] == [(397, 128), (5, 128)]
    printed = capsys.readouterr().out
    assert re.search(r"```\n(no head was loaded .*)\n```", page)[1] in printed
    assert namespace["callbacks"][0].receipt.startswith("student.backbone frozen for 21 optimizer steps")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", ALONE, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_from_the_first_to_the_last(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    namespace: dict[str, object] = {"__name__": "page"}
    for code in blocks(page):
        exec(compile(code, page.name, "exec"), namespace)
        for rule in namespace.get("rules", ()):
            assert rule.receipt  # it was in a run


def test_no_python_block_is_left_out():
    assert {page.name: len(blocks(page)) for page in PAGES if page.name in ON_README} == ON_README
    run = {*ALONE, *(page for page in PAGES if page.name in {*ON_README, "weights.md"})}
    assert [page for page in PAGES if blocks(page) and page not in run] == []
    assert [
        page for page in PAGES if re.search(r"^ *(```|~~~) *(py|pycon|python3|Python)\n", page.read_text(), re.M)
    ] == []


def test_the_recipes_of_the_page_are_there():
    files = re.findall(r"\| `(\w+\.yaml)` \|", (ROOT / "docs" / "training.md").read_text())
    assert sorted(files) == sorted(file.name for file in (ROOT / "examples" / "recipes").iterdir())


def test_every_callback_has_a_page():
    pages = [*(ROOT / "docs" / "callbacks").iterdir()]
    named = {page: re.findall(r"autoclass:: (\S+)", page.read_text()) for page in pages}
    names = [f"dino_head.callbacks.{name}" for name in sorted(dino_head.callbacks.__all__)]
    assert sorted(itertools.chain(*named.values())) == names
    assert [page.name for page in named if "| receipt | `" not in page.read_text()] == []


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    names = [f"dino_head.{name}" for name in dino_head.__all__]
    assert [name for name in names if f":: {name}\n" not in page] == []


def test_the_table_of_guarantees_names_tests_that_exist():
    source = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", "".join(page.read_text() for page in PAGES))
    assert len(set(named)) >= 30
    assert [name for name in named if f"def {name}(" not in source] == []


LINKS = [
    (page.parent, link)
    for page in PAGES
    for link in re.findall(
        r"\]\((?!https?://)([^)#]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    )
]


@pytest.mark.parametrize(("folder", "link"), LINKS)
def test_links_lead_somewhere(folder, link):
    assert (folder / link).exists()


def test_the_figures_and_pictures_of_collapses_are_on_their_page():
    page, folder = (ROOT / "docs" / "collapse.md").read_text(), ROOT / "docs" / "collapse"
    said = json.loads((folder / "said.json").read_text())
    assert {f"({folder.name}/{case}.png)" for case in said} == set(re.findall(r"\(collapse/\w+\.png\)", page))
    for case, seen in said.items():
        assert (folder / f"{case}.png").stat().st_size > 10_000
        for text in seen["diagnoses"]:
            assert f"| {text.split(':')[0]} |" in page
    assert [case for case, seen in said.items() if not seen["diagnoses"]][:1] == ["healthy"]
    for figure in ("95.2%", "97.5%", "98.0%"):
        assert figure in page
        assert figure in {f"{100 * seen['knn_top1']:.1f}%" for seen in said.values()}
    assert f"{said['many']['loss_per_lnK']:.2f} $" in page
    assert f"comes to {said['healthy']['loss_per_lnK']:.2f}." in page
    assert said["uniform"]["loss_per_lnK"] > 0.98
    assert said["one_hot"]["loss_per_lnK"] < 0.02
    assert said["left_behind"]["diagnoses"][0].startswith("teacher does not follow")


@pytest.mark.slow
def test_the_script_of_the_pictures_runs(tmp_path, monkeypatch):
    """On a tenth of the digits."""
    (train, train_labels), test = digits()
    monkeypatch.setattr(fit_digits, "digits", lambda: ((train[:140], train_labels[:140]), test))
    monkeypatch.setattr(sys, "argv", ["collapse.py", "--epochs", "1", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "collapse.py"), run_name="__main__")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        file.name for file in (ROOT / "docs" / "collapse").iterdir()
    )


COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text().replace("\\\n", " "), re.DOTALL)
    for line in block.splitlines()
    if ".py" in line
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_name_scripts_options_and_files_that_are_there(page, line):
    command = line.split("#")[0]
    (script,) = re.findall(r"(?:examples|benchmarks|docs)/\w+\.py", command)
    source = (ROOT / script).read_text()
    for option, value in re.findall(r"--([\w-]+(?:\.\w+)?) ?([^ ]*)", command.split(script)[1]):
        if option == "config":
            assert (ROOT / value).exists()
        elif script != "examples/cli.py":  # whose options are those of the classes
            assert f'"--{option}"' in source
