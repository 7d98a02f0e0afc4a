import argparse
import importlib
import importlib.util
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
README = ROOT / "README.md"
START, WATCHING = (ROOT / "docs" / f"{name}.md" for name in ("start", "watching"))
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *SITE]


def blocks(page):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


# The blocks of these pages build on the module of start.md and run one by one. How many there are:
ON_START = {"start.md": 3, "watching.md": 2, "guarantees.md": 1}
# The other pages of the site run from the first block to the last; weights.md and README.md have tests of their own.
ALONE = [page for page in SITE if blocks(page) and page.name not in {"weights.md", *ON_START}]


def block(text):
    """The code of the one block that contains the text, of the blocks that build on start.md's module."""
    code = [code for page in PAGES if page.name in ON_START for code in blocks(page)]
    (found,) = [code for code in code if text in code]
    return compile(found, "start.md", "exec")


@pytest.fixture
def mine(tmp_path, monkeypatch, capsys):
    """The namespace of start.md after the block with the module."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "start"}
    exec(block("class Mine"), namespace)
    return namespace


@pytest.mark.slow
def test_the_module_of_the_start_page_prints_the_receipt_on_it(mine, capsys):
    printed = capsys.readouterr().out.strip().splitlines()[-1]  # after the progress bar
    assert printed.startswith("student.head.last_layer frozen for 4 optimizer steps, bitwise unchanged")
    assert f"It prints `{printed}`." in START.read_text()


@pytest.mark.slow
def test_the_rules_of_the_start_page_print_the_receipts_on_it(mine, capsys):
    capsys.readouterr()
    exec(block("rules = ["), mine)
    printed = capsys.readouterr().out.strip().splitlines()[-4:]
    assert "\n".join(printed) in START.read_text()


def test_the_readme_is_short_and_shows_code_early():
    text = README.read_text()
    assert len(text.split()) <= 900
    assert text.splitlines().index("```python") < 40


@pytest.mark.slow
def test_the_module_of_the_readme_prints_its_receipts(capsys):
    torch.manual_seed(0)
    (code,) = blocks(README)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    *rules, watching = capsys.readouterr().out.strip().splitlines()[-3:]
    page = README.read_text()
    assert "\n".join(rules) in page
    assert watching.split(", last")[0] in page  # the values after it depend on the machine


@pytest.mark.slow
def test_the_last_layer_has_a_learning_rate_of_its_own(mine):
    exec(block("import parameter_groups"), mine)
    rates = {id(p): group["lr"] for group in mine["optimizer"].param_groups for p in group["params"]}
    assert rates.pop(id(mine["head"].last_layer.weight_v)) == 1e-4
    assert set(rates.values()) == {5e-4}
    assert len(rates) == sum(p.requires_grad for p in mine["student"].parameters()) - 1


@pytest.mark.slow
def test_the_checks_of_the_guarantees_name_batch_norm_and_randomness(mine, capsys):
    exec(block("def make():"), mine | {"TeacherUpdateCallback": TeacherUpdateCallback})
    printed = capsys.readouterr().out
    assert "one batch and 4 accumulated micro-batches differ at the end" in printed
    assert "batch norm (student.head.layers.1" in printed
    assert "an uninterrupted run and one resumed at an epoch's end differ at the end" in printed


@pytest.mark.slow
def test_the_watching_callbacks_log_each_value_and_write_a_report(mine, capsys, tmp_path):
    exec(block("watching = ["), mine)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "mine" / "curves.json").read_text())["looks"]
    names = set(re.findall(r"`((?:dino|knn)/\w+)`", WATCHING.read_text()))
    assert len(names) == 11
    assert [name for name in names if name not in printed] == []
    assert "a diagnosis needs 10 measurements." in (tmp_path / "runs" / "mine" / "report.html").read_text()


@pytest.mark.slow
def test_the_metrics_without_lightning(mine, capsys):
    exec(block("watching = ["), mine)
    capsys.readouterr()
    exec(block("from dino_head.metrics import"), mine)
    diagnosis, accuracy = capsys.readouterr().out.strip().splitlines()
    assert diagnosis == "None"
    assert accuracy.startswith("tensor(0.")


@pytest.fixture
def beside_a_digits_run(tmp_path, monkeypatch):
    """A short run in the default folder, runs/digits."""
    monkeypatch.chdir(tmp_path)
    main(["--epochs", "1", "--batch-size", "256", "--prototypes", "16"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
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
    patches = {"head.last_layer2.weight_g": torch.ones(7, 1), "head.last_layer2.weight_v": torch.randn(7, 4)}
    torch.save({"teacher": sides["teacher"] | patches}, "ibot.pth")
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
            assert torch.equal(namespace["patch_head"].last_layer.weight_v, patches["head.last_layer2.weight_v"])
            assert torch.equal(namespace["patch_head"].layers[0].weight, theirs["mlp.0.weight"])
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


def test_every_python_block_runs():
    assert {page.name: len(blocks(page)) for page in PAGES if page.name in ON_START} == ON_START
    run = {*ALONE, *(page for page in PAGES if page.name in {*ON_START, "weights.md", "README.md"})}
    assert [page for page in PAGES if blocks(page) and page not in run] == []
    assert [
        page for page in PAGES if re.search(r"^ *(```|~~~) *(py|pycon|python3|Python)\n", page.read_text(), re.M)
    ] == []


def test_snippets_import_installed_packages_alone():
    """The tests run in a checkout, where folders such as examples/ can be imported as well."""
    docstrings = [file for folder in ("dino_head", "callbacks", "examples") for file in (ROOT / folder).rglob("*.py")]
    imports = re.compile(r"^[ >]*(?:from|import) (?:benchmarks|callbacks|docs|examples|helpers|tests)\b.*", re.M)
    assert [line for file in (*PAGES, *docstrings) for line in imports.findall(file.read_text())] == []


def test_the_page_lists_every_recipe():
    section = (ROOT / "docs" / "training.md").read_text().split("\n## Recipes\n")[1].split("\n## ")[0]
    recipes = (ROOT / "examples" / "recipes").glob("*.yaml")
    assert sorted(re.findall(r"\| `(\w+)` \|", section)) == sorted(file.stem for file in recipes)


def test_every_callback_has_a_page():
    pages = [*(ROOT / "docs" / "callbacks").iterdir()]
    named = {page: re.findall(r"autoclass:: (\S+)", page.read_text()) for page in pages}
    names = [f"dino_head.callbacks.{name}" for name in sorted(dino_head.callbacks.__all__)]
    assert sorted(itertools.chain(*named.values())) == names
    assert [page.name for page in named if "| receipt | `" not in page.read_text()] == []


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs" / "api.md").read_text()
    for module in ("", ".functional", ".metrics", ".checkpoints", ".vision", ".callbacks.testing"):
        names = set(importlib.import_module(f"dino_head{module}").__all__)
        names -= set(dino_head.__all__) if module else set()
        assert [name for name in names if f":: dino_head{module}.{name}\n" not in page] == []


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
    assert f"{said['many']['loss_normalized']:.2f} $" in page
    assert f"compared with {said['healthy']['loss_normalized']:.2f} in" in page
    assert said["uniform"]["loss_normalized"] > 0.98
    assert said["one_hot"]["loss_normalized"] < 0.02
    assert said["left_behind"]["diagnoses"][0].startswith("teacher does not follow")


@pytest.mark.slow
def test_the_script_of_the_pictures_runs(tmp_path, monkeypatch):
    """On a tenth of the digits."""
    (train, train_labels), test = digits()
    monkeypatch.setattr(fit_digits, "digits", lambda: ((train[:140], train_labels[:140]), test))
    monkeypatch.setattr("dino_head.callbacks.report.charts.SHOWN", 1)
    monkeypatch.setattr(sys, "argv", ["collapse.py", "--epochs", "1", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "collapse.py"), run_name="__main__")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        file.name for file in (ROOT / "docs" / "collapse").iterdir()
    )


COMMANDS = [
    (page.name, " ".join(line.split("#")[0].split()))
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text().replace("\\\n", " "), re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize(("page", "line"), [command for command in COMMANDS if ".py" in command[1]])
def test_commands_name_scripts_and_options_that_exist(page, line):
    (script,) = re.findall(r"(?:examples|benchmarks|docs)/\w+\.py", line)
    source = (ROOT / script).read_text()
    if "with_recipe" in source:
        source += (ROOT / "dino_head" / "cli" / "flags.py").read_text()
    for option in re.findall(r"--([\w-]+)", line.split(script)[1]):
        assert f'"--{option}"' in source or f'"{option}"' in source


@pytest.mark.parametrize(
    ("page", "line"), [command for command in COMMANDS if "dino" in command[1] and " fit " in command[1]]
)
def test_commands_name_recipes_and_flags_that_exist(page, line):
    from dino_head.cli.flags import Command, recipes

    flags, rest = Command().parse_known_args(line.split(" fit ")[1].split())
    assert flags.config in recipes() if flags.config else flags.resume
    assert [word for word in rest if word.startswith("--") and "." not in word] == []


@pytest.mark.parametrize(("page", "line"), [command for command in COMMANDS if "python -m dino_head" in command[1]])
def test_commands_name_modules_that_exist(page, line):
    (module,) = re.findall(r"-m (dino_head[\w.]*)", line)
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__") is not None
