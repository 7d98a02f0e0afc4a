import math

import pytest
import torch

from dino_head.diagnosis import case_of, diagnose, is_collapse

HEALTHY = {  # seen in epoch 30 of the digits
    "loss": 1.57,
    "loss_normalized": 0.252,
    "teacher_entropy": 1.10,
    "teacher_entropy_normalized": 0.177,
    "student_entropy": 1.72,
    "student_entropy_normalized": 0.276,
    "kl": 0.47,
    "prototypes_used": 0.146,
    "prototype_perplexity": 75.3,
    "rows": 1280,
    "output_dim": 512,
    "rankme": 14.7,
    "loss_change": -0.05,
    "teacher_follows": 1,
}
STUCK = {
    "loss": 9.8,
    "loss_normalized": 0.884,
    "teacher_entropy": 9.4,
    "teacher_entropy_normalized": 0.848,
    "student_entropy_normalized": 0.89,
    "kl": 0.4,
    "loss_change": -0.002,
    "output_dim": 65536,
    "prototypes_used": 0.015,
}


def test_a_healthy_run_gets_no_diagnosis():
    assert diagnose(HEALTHY) is None
    assert diagnose({}) is None


@pytest.mark.parametrize(
    ("change", "case", "words"),
    [
        ({"teacher_follows": 0}, "teacher does not follow", ["TeacherUpdateCallback"]),
        ({"prototype_perplexity": 1.2}, "one-hot collapse", ["1.20 of 512", "center_momentum", "sinkhorn"]),
        (
            {"teacher_entropy": 6.19, "teacher_entropy_normalized": 0.993, "student_entropy_normalized": 0.991},
            "uniform teacher",
            ["6.1900 nats", "0.993 ln K", "Lower the teacher temperature", "not the same object"],
        ),
        (
            {"teacher_entropy_normalized": 0.993, "student_entropy_normalized": 0.991, "rankme": 1.02},
            "uniform teacher",
            ["effective rank of the embeddings is 1.02: look at a batch first", "Lower the teacher temperature"],
        ),
        ({"rankme": 1.3}, "dimensional collapse", ["1.30", "batch norm"]),
        ({"prototypes_used": 0.02}, "dead prototypes", ["10 of 512", "1280 rows", "output_dim", "harmless"]),
        ({"sinkhorn_rows": 128}, "few samples for Sinkhorn", ["128 rows (images, all", "512 prototypes", "output_dim"]),
        (STUCK, "no collapse", ["9.80 nats", "0.88 ln K", "K = 65536", "9.40 of it", "0.40 are KL", "kNN"]),
    ],
)
def test_each_case_is_named_with_its_numbers_and_knobs(change, case, words):
    text = diagnose({**HEALTHY, **change})
    assert text.startswith(f"{case}: ")
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_entropy_normalized": 0.993},  # the student is sharp: it has something to learn
        {"output_dim": 2, "prototype_perplexity": 1.98, "prototypes_used": 1.0},  # both of two
        {**STUCK, "output_dim": 512, "prototypes_used": 0.2},  # K is not large
        {**STUCK, "loss_change": -0.03},  # it falls
        {**STUCK, "loss_normalized": 0.5},  # it is low
        {"sinkhorn_rows": 512},  # one for each prototype
        {"prototypes_used": 0.0005, "output_dim": 65536, "rows": 40},  # 40 rows cannot reach more
    ],
)
def test_what_is_no_case(change):
    assert diagnose({**HEALTHY, **change}) is None


@pytest.mark.parametrize(
    ("change", "text", "failed"),
    [
        ({"prototype_perplexity": 1.2}, "patches: one-hot collapse: all patches get the same prototype", True),
        ({"rankme": 1.3}, "patches: dimensional collapse: ", True),
        ({"kl": math.nan}, "patches: not finite: kl. ", True),
        ({"sinkhorn_rows": 128}, "patches: few samples for Sinkhorn: a batch has 128 rows (patches, all", False),
        (STUCK, "patches: no collapse: ", False),
    ],
)
def test_diagnoses_of_patches_name_them(change, text, failed):
    found = diagnose({**HEALTHY, **change}, rows="patches")
    assert found.startswith(text)
    assert case_of(found) == ":".join(text.split(":")[:2])
    assert is_collapse(found) == is_collapse(found.removeprefix("patches: ")) == failed
    assert diagnose(HEALTHY, rows="patches") is None


def test_an_unknown_kind_of_rows_raises():
    with pytest.raises(ValueError, match='rows must be "images" or "patches", got \'tokens\''):
        diagnose(HEALTHY, rows="tokens")


def test_a_collapse_is_named_before_a_large_k():
    assert diagnose({**HEALTHY, **STUCK, "rankme": 1.1}).startswith("dimensional collapse")


def test_few_samples_for_sinkhorn_come_last():
    assert diagnose({**HEALTHY, **STUCK, "sinkhorn_rows": 128}).startswith("no collapse")


@pytest.mark.parametrize("missing", list(HEALTHY))
def test_a_case_whose_values_are_missing_is_not_looked_for(missing):
    assert diagnose({name: value for name, value in HEALTHY.items() if name != missing}) is None


def test_values_that_are_not_finite_are_named():
    text = diagnose({**HEALTHY, "kl": math.nan, "loss": math.inf})
    assert text.startswith("not finite: loss, kl. ")


def test_tensors_are_numbers_too():
    assert diagnose({"rankme": torch.tensor(1.0)}).startswith("dimensional collapse")
