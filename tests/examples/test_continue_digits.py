import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dino_head.checkpoints import load_head
from dino_head.examples import continue_digits, fit_digits
from dino_head.examples.continue_digits import DustyDigits, below, build, main

# The backbone as somebody writes it who has PyTorch and the file, but not this project.
ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file
from torch import nn

def block(i, o, stride):
    return [nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

net = nn.Sequential(
    *block(1, 32, 1), *block(32, 32, 2), *block(32, 64, 1), *block(64, 64, 2), *block(64, 128, 1),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)
folder = sys.argv[1]
for state in (torch.load(folder + "/backbone.pt", weights_only=True), load_file(folder + "/backbone.safetensors")):
    net.load_state_dict(state)
    with torch.no_grad():
        features = net.eval()(torch.load(folder + "/images.pt", weights_only=True))
    assert torch.equal(features, torch.load(folder + "/features.pt", weights_only=True))
assert not [name for name in sys.modules if name.split(".")[0] in ("dino_head", "lightning")]
print("the same features")
"""


@pytest.fixture(scope="module", autouse=True)
def fewer_digits():
    """A quarter of the images, in this process."""
    quarter = [(images[::4], labels[::4]) for images, labels in fit_digits.digits()]
    with pytest.MonkeyPatch.context() as patch:
        for module in (fit_digits, continue_digits):
            patch.setattr(module, "digits", lambda size=16: quarter)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    fit_digits.main(["--epochs", "1", "--batch-size", "256", "--prototypes", "16", "--out", str(out)])
    return out / "checkpoints" / "last.ckpt"


def saved(file):
    return torch.load(file, weights_only=True)["state_dict"]


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_model_starts_from_the_teacher_and_the_center_of_the_checkpoint(checkpoint):
    model, state = build(checkpoint), saved(checkpoint)
    for side in (model.student, model.teacher):
        assert same(side["backbone"].state_dict(), below("teacher.backbone", state))
        assert same(side["head"].state_dict(), below("teacher.head", state))
    assert state["loss.center"].any()
    assert torch.equal(model.loss.center, state["loss.center"])


def test_a_new_head_may_have_another_size(checkpoint):
    model = build(checkpoint, prototypes=24)
    assert model.loss.center.shape == (1, 1, 24)
    assert model.student["head"].last_layer.weight.shape == (24, 64)
    assert same(model.teacher["backbone"].state_dict(), below("teacher.backbone", saved(checkpoint)))


def test_the_dust_is_the_same_each_time_and_covers_a_share_of_the_pixels():
    (dusty, labels), _ = DustyDigits().labelled()
    (clean, clean_labels), _ = fit_digits.digits()
    assert torch.equal(dusty, DustyDigits().labelled()[0][0])
    assert torch.equal(labels, clean_labels)
    assert (dusty != clean).float().mean().item() == pytest.approx(0.15, abs=0.005)


def test_the_warm_up_trains_the_head_alone(checkpoint, tmp_path):
    options = ["--epochs", "1", "--warmup-steps", "99", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    main(options)
    before, after = saved(checkpoint), saved(tmp_path / "out" / "best.ckpt")
    weights = {name for name, _ in fit_digits.conv_net().named_parameters()}
    for side in ("student", "teacher"):
        for name in weights:
            assert torch.equal(after[f"{side}.backbone.{name}"], before[f"teacher.backbone.{name}"])
        assert not torch.equal(after[f"{side}.head.layers.0.weight"], before["teacher.head.layers.0.weight"])


def test_the_backbone_gives_the_same_features_elsewhere(checkpoint, tmp_path):
    out = tmp_path / "out"
    main(["--epochs", "1", "--checkpoint", str(checkpoint), "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == {
        "knn_top1_before", "knn_top1", "knn_top1_of_the_backbone_written", "fell_below_the_start",
    }  # fmt: skip
    assert len(summary["knn_top1"]) == 1
    images = DustyDigits().labelled()[1][0][:20]
    best = build(out / "best.ckpt")
    trained = below("teacher.backbone", saved(checkpoint))
    assert not same(best.teacher["backbone"].state_dict(), trained)
    with torch.no_grad():
        torch.save(best.eval()(images), out / "features.pt")
    torch.save(images, out / "images.pt")
    assert same(load_file(out / "backbone.safetensors"), best.teacher["backbone"].state_dict())
    printed = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(out)], check=True, capture_output=True, text=True
    ).stdout
    assert printed == "the same features\n"


@pytest.mark.parametrize(("start", "epochs"), [(0.999, 1), (0.2, 2)])
def test_the_run_stops_when_the_features_become_worse_than_at_the_start(
    checkpoint, tmp_path, monkeypatch, start, epochs
):
    monkeypatch.setattr(continue_digits, "knn_top1", lambda *args: start)
    main(["--epochs", "2", "--warmup-steps", "0", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0.2 < min(summary["knn_top1"]) < 0.99
    assert len(summary["knn_top1"]) == epochs
    assert summary["fell_below_the_start"] is (epochs == 1)
    assert summary["knn_top1_of_the_backbone_written"] == max(summary["knn_top1"])
    assert (tmp_path / "out" / "backbone.pt").exists()


def test_a_folder_in_use_or_a_missing_checkpoint_is_an_error(checkpoint, tmp_path, capsys):
    (tmp_path / "kept.txt").touch()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"backbone": {}}, tmp_path / "other.ckpt")
    new = ["--out", str(tmp_path / "new")]
    for options, message in (
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--prototypes", "1"], "--prototypes must be at least 2, got 1"),
        (["--checkpoint", str(checkpoint), "--out", str(tmp_path / "kept.txt")], "is no empty folder"),
        (["--checkpoint", str(tmp_path / "text.ckpt"), *new], "text.ckpt is not a complete checkpoint"),
        (["--checkpoint", str(tmp_path / "other.ckpt"), *new], "other.ckpt is not a complete checkpoint (KeyError)"),
        (["--checkpoint", str(checkpoint), "--out", str(tmp_path)], "is no empty folder: choose another"),
        (
            ["--checkpoint", str(tmp_path / "no.ckpt"), "--out", str(tmp_path / "new")],
            "run examples/fit_digits.py first",
        ),
    ):
        with pytest.raises(SystemExit):
            main(options)
        assert message in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"kept.txt", "text.ckpt", "other.ckpt"}


def test_the_head_of_a_lightning_checkpoint_is_found_by_its_side(checkpoint, tmp_path):
    state = saved(checkpoint)
    for side in ("student", "teacher"):
        assert same(load_head(checkpoint, side).state_dict(), below(f"{side}.head", state))
    save_file(state, tmp_path / "all.safetensors")
    assert same(load_head(tmp_path / "all.safetensors").state_dict(), below("teacher.head", state))
