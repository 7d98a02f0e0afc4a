import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_head import DINOLoss, dino_loss

REFERENCE = Path(__file__).parent / "reference"
SETTINGS = {
    "loss_dino": {"warmup_teacher_temp_epochs": 5},
    "loss_nidl": {"warmup_teacher_temp_epochs": 5},
    "loss_nidl_3teachers": {
        "warmup_teacher_temp": 0.03,
        "teacher_temp": 0.06,
        "warmup_teacher_temp_epochs": 4,
        "student_temp": 0.2,
        "center_momentum": 0.5,
    },
}


def oracle(teacher, student, center, teacher_temp, student_temp) -> float:
    """The definition, sum by sum in float64."""
    teacher, student, center = (np.asarray(array, dtype=np.float64) for array in (teacher, student, center))
    losses = []
    for t in range(len(teacher)):
        for s in range(len(student)):
            for b in range(teacher.shape[1]):
                if s != t:
                    p = np.exp((teacher[t, b] - center) / teacher_temp)
                    z = student[s, b] / student_temp
                    losses.append(-(p / p.sum() * (z - np.log(np.exp(z).sum()))).sum())
    return float(np.mean(losses))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_equals_the_reference_call_by_call(name):
    figures = {key: torch.from_numpy(value) for key, value in np.load(REFERENCE / f"{name}.npz").items()}
    calls = sorted({key.split("/")[0] for key in figures})
    loss = DINOLoss(figures["0/student"].shape[-1], **SETTINGS[name])
    for call in calls:
        student = figures[f"{call}/student"].requires_grad_()
        value = loss(figures[f"{call}/teacher"], student, int(figures[f"{call}/epoch"]))
        value.backward()
        torch.testing.assert_close(value, figures[f"{call}/loss"].reshape(()), rtol=1e-5, atol=0)
        expected = figures[f"{call}/grad_student"]
        torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(loss.center.flatten(), figures[f"{call}/center_after"], rtol=1e-5, atol=1e-6)
    assert len(calls) >= 3


@pytest.mark.parametrize(("views_t", "views_s"), [(1, 2), (2, 2), (2, 5), (3, 4)])
def test_equals_the_definition(views_t, views_s):
    torch.manual_seed(0)
    teacher, student, center = torch.randn(views_t, 3, 7), torch.randn(views_s, 3, 7), torch.randn(1, 1, 7)
    value = dino_loss(teacher, student, center=center, teacher_temp=0.5, student_temp=0.2)
    assert value.item() == pytest.approx(oracle(teacher, student, center[0, 0], 0.5, 0.2), rel=1e-5)


def test_gradient_in_float64():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: dino_loss(teacher, s), student.requires_grad_())


def test_the_teacher_gets_no_gradient():
    teacher, student = torch.randn(2, 3, 16, requires_grad=True), torch.randn(4, 3, 16, requires_grad=True)
    DINOLoss(16)(teacher, student).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_epoch_chooses_the_temperature():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 16), torch.randn(4, 3, 16)
    loss = DINOLoss(16, 0.04, 0.07, 4).eval()
    values = {epoch: loss(teacher, student, epoch).item() for epoch in (0, 1, 3, 9, None)}
    assert values[3] == values[9] == values[None] != values[0]
    assert values[1] == pytest.approx(loss(teacher, student, teacher_temp=0.05).item())
    assert loss(teacher, student, 3, teacher_temp=0.04).item() == values[0]


def test_the_center_moves_in_training_alone():
    loss = DINOLoss(16)
    teacher, student = torch.ones(2, 3, 16), torch.randn(4, 3, 16)
    loss.eval()(teacher, student)
    assert not loss.center.any()
    loss.train()(teacher, student)
    torch.testing.assert_close(loss.center, torch.full((1, 1, 16), 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_center_is_float32_whatever_the_model(dtype):
    loss = DINOLoss(16)
    loss.center.normal_()
    before = loss.center.clone()
    loss.to(dtype)
    assert torch.equal(loss.center, before)  # not even rounded on the way
    assert loss.center.dtype == torch.float32
    assert loss(torch.randn(2, 3, 16, dtype=dtype), torch.randn(4, 3, 16, dtype=dtype)).isfinite()
    assert loss.center.dtype == torch.float32


def test_low_precision_logits_make_a_float32_loss():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 16).bfloat16(), torch.randn(4, 3, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = dino_loss(teacher, student)
    torch.testing.assert_close(value, dino_loss(teacher.float(), student.float()))


def test_the_center_is_part_of_the_state():
    loss = DINOLoss(16)
    loss.center.normal_()
    other = copy.deepcopy(loss)
    other.center.zero_()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.center, loss.center)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16)])
def test_centers_of_other_libraries_load(shape):
    loss, center = DINOLoss(16), torch.randn(16)
    state = {"center": center.reshape(shape)}
    loss.load_state_dict(state)
    assert torch.equal(loss.center.flatten(), center)
    assert state["center"].shape == shape  # the caller's dictionary stays as it was


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_center_saved_in_another_type_loads_as_float32(dtype):
    loss = DINOLoss(16)
    loss.load_state_dict({"center": torch.ones(1, 1, 16, dtype=dtype)}, assign=True)
    assert loss.center.dtype == torch.float32
    assert loss(torch.randn(2, 3, 16), torch.randn(4, 3, 16)).isfinite()


def test_a_center_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for center"):
        DINOLoss(16).load_state_dict({"center": torch.zeros(8)})


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ((2, 3, 16), (4, 5, 16), "the same B and K"),
        ((2, 3, 16), (4, 3, 8), "the same B and K"),
        ((2, 3, 8), (4, 3, 8), r"made for 16 prototypes \(output_dim\), got a teacher with 8"),
        ((4, 3, 16), (2, 3, 16), "at least as many"),
        ((1, 3, 16), (1, 3, 16), "no pair of different views"),
        ((2, 0, 16), (4, 0, 16), "at least one sample"),
        ((6, 16), (12, 16), r"expects logits \(V, B, K\) of V views, got \(6, 16\): stack"),
    ],
)
def test_shapes_that_do_not_fit(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        DINOLoss(16)(torch.zeros(teacher), torch.zeros(student))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dim": 0}, "output_dim must be an integer >= 1"),
        ({"teacher_temp": 0.0}, r"teacher_temp must be a number in \(0, inf\], got 0.0"),
        ({"student_temp": -1}, "student_temp must be a number"),
        ({"warmup_teacher_temp": float("nan")}, "warmup_teacher_temp must be a number"),
        ({"center_momentum": 1.5}, r"center_momentum must be a number in \[0, 1\], got 1.5"),
        ({"warmup_teacher_temp_epochs": -1}, "warmup_teacher_temp_epochs must be an integer >= 0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DINOLoss(**options)


@pytest.mark.parametrize("options", [{"teacher_temp": 0}, {"student_temp": -1}])
def test_temperatures_of_the_function_are_checked(options):
    with pytest.raises(ValueError, match="_temp must be a number"):
        dino_loss(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), **options)


def test_an_epoch_is_not_negative():
    with pytest.raises(ValueError, match="epoch must be an integer >= 0, got -1"):
        DINOLoss(16)(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), epoch=-1)


def test_a_temperature_by_step_is_checked():
    with pytest.raises(ValueError, match="teacher_temp must be a number"):
        DINOLoss(16)(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), teacher_temp=0)
