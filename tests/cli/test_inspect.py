import subprocess
import sys

import pytest
import torch

from dino_head import DINOProjectionHead
from dino_head.cli import main


def head(**options):
    torch.manual_seed(0)
    return DINOProjectionHead(6, 8, 4, 12, **options)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def test_inspect_describes_every_head_and_changes_nothing(tmp_path, capsys):
    file = tmp_path / "ein Kopf.pth"
    student = head().state_dict()
    student["layers.6.bias"] = torch.full((4,), torch.nan)
    backbone = {"teacher.backbone.a": torch.ones(1), "teacher.backbone.b": torch.ones(1)}
    heads = {**under("student.head.", student), **under("teacher.head.", head().state_dict())}
    torch.save({**heads, **backbone, "epoch": 3}, file)
    before = file.read_bytes()
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 1  # as one of the heads is broken
    assert lines[0] == "heads: student.head, teacher.head"
    assert lines[2].startswith("error: the head 'student.head' would be DINOProjectionHead(")
    assert "4 of 4 values of student.head.layers.6.bias are not finite" in lines[2]
    assert lines[4].startswith("teacher.head: DINOProjectionHead(input_dim=6, hidden_dim=8, bottleneck_dim=4")
    assert "  teacher.head.layers.6.bias -> layers.6.bias (4,) torch.float32" in lines
    assert lines[-2:] == ["not used: teacher.backbone.* (2 tensors)", "other entries: epoch"]
    assert file.read_bytes() == before
    assert [*tmp_path.iterdir()] == [file]


def test_inspect_of_loadable_heads_ends_without_an_error(tmp_path, capsys):
    torch.save(head().state_dict(), tmp_path / "head.pth")
    main(["inspect", str(tmp_path / "head.pth")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["heads: the whole file", ""]
    assert len(lines) == 2 + 2 + len(head().state_dict()) + 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing.pth", "No such file"), ("backbone.pth", "error: there is no DINO head .*backbone.weight")],
)
def test_inspect_of_a_file_without_heads_names_the_reason(name, message, tmp_path):
    torch.save({"backbone.weight": torch.ones(2)}, tmp_path / "backbone.pth")
    with pytest.raises(SystemExit, match=message):
        main(["inspect", str(tmp_path / name)])


INSPECT = """
import sys
from dino_head.cli import main
main(["inspect", sys.argv[1]])
print(*[name for name in ("lightning", "torchmetrics", "jsonargparse") if name in sys.modules])
"""


def test_inspect_loads_no_lightning(tmp_path):
    torch.save(head().state_dict(), tmp_path / "head.pth")
    command = [sys.executable, "-W", "ignore", "-c", INSPECT, str(tmp_path / "head.pth")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "heads: the whole file"
    assert lines[-1] == ""


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_the_commands(words, capsys):
    main(words)
    printed = capsys.readouterr().out
    assert "dino-head fit --config digits" in printed
    assert "dino-head inspect FILE" in printed


def test_fit_without_its_packages_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(
        SystemExit, match=r'^dino-head: error: dino-head fit needs jsonargparse: .*"dino-head\[train\]"'
    ):
        main(["fit", "--help"])


def test_an_unknown_command_is_an_error_that_names_it(capsys):
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err == "dino-head: error: unknown command 'train': use fit or inspect\n"
