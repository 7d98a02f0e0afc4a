"""The examples as files to be read, run and copied."""

import ast
import io
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(text):
    """Number of lines without docstrings, comments and blank lines."""
    documentation = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documentation |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            code |= {*range(token.start[0], token.end[0] + 1)}
    return len(code - documentation)


def test_lines_of_code_are_counted():
    assert (
        lines_of_code('"""A\ntext."""\n\n# comment\nx = (\n    1\n)\n\n\ndef f():\n    """One."""\n    return x\n') == 5
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short(script):
    assert lines_of_code(script.read_text()) <= {"dino_module": 80, "dinov2_module": 110}.get(script.stem, 150)


COPY = """
import sys
import torch
from lightning.pytorch import Trainer
from torch import nn
from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss
from my_dino_module import DINO
from my_dinov2_module import DINOv2

backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
head = DINOProjectionHead(8, 8, 4, 16, batch_norm=False)
module = DINO(backbone, head, DINOLoss(16), lambda images: [images, images.flip(2), images.flip(3)])
before = backbone[1].weight.clone()
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
Trainer(max_steps=2, **options).fit(module, torch.utils.data.DataLoader(torch.randn(8, 1, 8, 8), batch_size=4))
assert not torch.equal(backbone[1].weight, before)
assert DINO.__module__ == "my_dino_module"


class Patches(nn.Module):
    patch_size = (2, 2)

    def __init__(self):
        super().__init__()
        self.patch_embed, self.mask_token = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.zeros(8))

    def forward(self, images, masks=None):
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        patches = patches if masks is None else torch.where(masks[..., None], self.mask_token, patches)
        return patches.mean(dim=1), patches


backbone = Patches()
losses = DINOLoss(16), IBOTPatchLoss(16)
module = DINOv2(backbone, head, *losses, lambda images: [images, images.flip(2), images.flip(3)], layer_decay=1.0)
Trainer(max_steps=2, **options).fit(module, torch.utils.data.DataLoader(torch.randn(8, 1, 8, 8), batch_size=4))
assert backbone.mask_token.any()
heavy = ("dino_head.examples", "dino_head.vision", "dino_head.cli", "dino_head.callbacks", "kornia")
print("loaded:", *[name for name in heavy if name in sys.modules])
"""


def test_copies_of_the_modules_train_in_an_empty_folder(tmp_path):
    """With dino_head, lightning and torch alone."""
    for name in ("dino_module", "dinov2_module"):
        shutil.copy(EXAMPLES / f"{name}.py", tmp_path / f"my_{name}.py")
    (tmp_path / "mine.py").write_text(COPY)
    done = subprocess.run([sys.executable, "-W", "ignore", "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "loaded:"
    imported = set()
    for copy in tmp_path.glob("my_*.py"):
        for node in ast.walk(ast.parse(copy.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    packages = {name.split(".")[0] for name in imported} - {*sys.stdlib_module_names}
    assert packages == {"dino_head", "lightning", "torch"}
    assert not [name for name in imported if name.startswith("dino_head.")]


def test_a_script_runs_as_a_module_from_any_folder(tmp_path):
    """Other tests run the scripts as files."""
    command = [sys.executable, "-W", "ignore", "-m", "dino_head.examples.fit_images", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--config NAME_OR_FILE" in done.stdout
    assert [*tmp_path.iterdir()] == []
