import argparse

import pytest
from helpers.photos import TINY_VIT, make_photos

from dino_head.examples.fit_images import linear_rule, main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*fork.*", "ignore:.*logging interval")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return make_photos(tmp_path / "photos")


def flags(**given):
    return argparse.Namespace(**{"batch_size": None, "epochs": None, "devices": None, **given})


@pytest.mark.parametrize(("given", "rate", "warmup"), [
    ({}, 5e-4 * 64 / 256, 10),
    ({"batch_size": 32, "epochs": 50}, 5e-4 * 32 / 256, 5),
    ({"batch_size": 32, "epochs": 300, "devices": 2}, 5e-4 * 32 * 2 / 256, 10),
])  # fmt: skip
def test_the_learning_rate_follows_the_linear_rule(given, rate, warmup):
    name, value, more = linear_rule(flags(**given))
    assert name == "--learning-rate"
    assert float(value) == pytest.approx(rate)
    assert more == f"--model.warmup_epochs={warmup}"


def test_the_script_trains_by_the_rule_and_resumes_without_flags(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", str(photos), "--epochs", "10", "--batch-size", "16", "--trainer.max_steps=2", *TINY_VIT]
    main(options)
    out = tmp_path / "runs" / "images"
    config = (out / "config.yaml").read_text()
    assert "learning_rate: 3.125e-05" in config
    assert "warmup_epochs: 1\n" in config
    (out / "summary.json").unlink()
    main(["--resume"])
    assert (out / "summary.json").exists()
    assert (out / "config.yaml").read_text() == config
