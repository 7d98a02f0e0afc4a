import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import distributed_parts
from helpers.processes import run_in_processes

from dino_head import DINOLoss, FactoredLogits, IBOTPatchLoss
from dino_head.functional.ibot import reference_ibot_patch_loss

KINDS = pytest.mark.parametrize("kind", [DINOLoss, IBOTPatchLoss])
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


@pytest.mark.parametrize("kind", ["logits", "lists", "factored"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_equals_the_reference_call_by_call(name, kind):
    figures = {key: torch.from_numpy(value) for key, value in np.load(REFERENCE / f"{name}.npz").items()}
    calls = sorted({key.split("/")[0] for key in figures})
    loss = DINOLoss(figures["0/student"].shape[-1], **SETTINGS[name])
    for call in calls:
        student = figures[f"{call}/student"].requires_grad_()
        out = [figures[f"{call}/teacher"], student]
        if kind == "lists":
            out = [list(side) for side in out]
        if kind == "factored":  # as many prototypes as directions
            out = [FactoredLogits(side, torch.eye(side.shape[-1])) for side in out]
        value = loss(*out, int(figures[f"{call}/epoch"]))
        value.backward()
        torch.testing.assert_close(value, figures[f"{call}/loss"].reshape(()), rtol=1e-5, atol=0)
        expected = figures[f"{call}/grad_student"]
        torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(loss.center.flatten(), figures[f"{call}/center_after"], rtol=1e-5, atol=1e-6)
    assert len(calls) >= 3


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


def quarters(tensor):
    return tensor.chunk(4, dim=1)


@pytest.mark.parametrize("factored", [True, False])
def test_a_deferred_center_moves_once_by_all_that_was_collected(factored):
    torch.manual_seed(0)
    z, prototypes, student = torch.randn(2, 8, 4), torch.randn(16, 4), torch.randn(4, 8, 16)
    whole, parts = DINOLoss(16), DINOLoss(16)
    parts.defer_center_update = True
    for _ in range(3):
        whole(z @ prototypes.T, student)
        before = parts.center.clone()
        for part, other in zip(quarters(z), quarters(student), strict=True):
            teacher = FactoredLogits(part, prototypes) if factored else part @ prototypes.T
            other = FactoredLogits(other, torch.eye(16)) if factored else other
            parts(teacher, other)
            assert torch.equal(parts.center, before)
        parts.apply_center_update()
        torch.testing.assert_close(parts.center, whole.center, rtol=1e-5, atol=1e-6)


def test_a_deferred_center_weighs_by_samples():
    loss = DINOLoss(16, center_momentum=0.0)
    loss.defer_center_update = True
    loss(torch.ones(2, 3, 16), torch.zeros(2, 3, 16))
    loss(torch.zeros(2, 1, 16), torch.zeros(2, 1, 16))
    loss.apply_center_update()
    torch.testing.assert_close(loss.center, torch.full((1, 1, 16), 0.75))


def test_without_anything_collected_the_center_stays_bitwise():
    loss = DINOLoss(16)
    loss.center.normal_()
    loss.defer_center_update = True
    before = loss.center.clone()
    loss.apply_center_update()
    loss.eval()(torch.ones(2, 3, 16), torch.zeros(2, 3, 16))  # collects nothing either
    loss.apply_center_update()
    assert torch.equal(loss.center, before)


@KINDS
def test_collected_sums_are_not_in_the_state_dict(kind):
    assert list(kind(16).state_dict()) == ["center"]
    assert list(kind(16, centering="sinkhorn").state_dict()) == []


@pytest.mark.parametrize("momentum", [0, 1])
def test_momenta_at_the_limits(momentum):
    loss = DINOLoss(16, center_momentum=momentum)
    loss(torch.ones(2, 3, 16), torch.zeros(2, 3, 16))
    torch.testing.assert_close(loss.center, torch.full((1, 1, 16), 1.0 - momentum))


@pytest.mark.parametrize(("warmup_epochs", "first"), [(0, 0.07), (1, 0.04), (2, 0.04)])
def test_warm_up_of_few_epochs(warmup_epochs, first):
    loss = DINOLoss(16, warmup_teacher_temp_epochs=warmup_epochs)
    assert [loss.temperature(epoch) for epoch in (0, 1, 10_000)] == pytest.approx([first, 0.07, 0.07])


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_sinkhorn_takes_its_targets_from_the_batch(factored, training):
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 16), torch.randn(4, 3, 16)
    mass = (teacher.double().flatten(0, 1) / 0.07).exp()
    for _ in range(3):
        mass = mass / mass.sum(dim=0)
        mass = mass / mass.sum(dim=1, keepdim=True)
    log_q = (student.double() / 0.1).log_softmax(dim=-1)
    p = mass.unflatten(0, (2, 3))
    expected = torch.stack([-(p[t] * log_q[s]).sum(-1).mean() for t in range(2) for s in range(4) if s != t]).mean()
    out = [FactoredLogits(side, torch.eye(16)) for side in (teacher, student)] if factored else [teacher, student]
    loss = DINOLoss(16, centering="sinkhorn").train(training)
    assert loss(*out).item() == pytest.approx(expected.item(), rel=1e-5)
    loss.apply_center_update()  # does nothing, so that callbacks need not ask
    assert loss.center is None
    assert loss.half().center is None


@pytest.mark.distributed
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_two_processes_equal_one_on_the_joined_batch(centering, tmp_path):
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 6, 16), torch.randn(4, 6, 16)
    torch.save((centering, teacher, student), tmp_path / "input.pt")
    expected = distributed_parts.objective(DINOLoss(16, centering=centering), teacher, student)
    first, second = run_in_processes(distributed_parts.objective_of_my_samples, tmp_path)
    joined = (2 * first["loss"] + 4 * second["loss"]) / 6
    torch.testing.assert_close(joined, expected["loss"], rtol=1e-5, atol=0)
    gradient = torch.cat([first["gradient"] * 2 / 6, second["gradient"] * 4 / 6], dim=1)
    torch.testing.assert_close(gradient, expected["gradient"], rtol=1e-5, atol=1e-6)
    for rank in (first, second):
        torch.testing.assert_close(rank["center"], expected["center"], rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_a_deferred_center_is_the_mean_of_all_that_every_process_saw(tmp_path):
    """DDP gives all processes the first one's buffers before each forward: what is collected must not be one."""
    logits = torch.randn(2, 2, 2, 3, 16)
    torch.save(logits, tmp_path / "logits.pt")
    for center in run_in_processes(distributed_parts.deferred_center, tmp_path):
        torch.testing.assert_close(center.flatten(), 0.1 * logits.mean(dim=(0, 1, 2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_center_is_float32_whatever_the_model(dtype):
    loss = DINOLoss(16)
    loss.center.normal_()
    loss.defer_center_update = True
    loss(torch.randn(2, 3, 16), torch.randn(4, 3, 16))
    before = [buffer.clone() for buffer in loss.buffers()]
    loss.to(dtype)
    assert all(map(torch.equal, loss.buffers(), before))  # not even rounded on the way
    loss.apply_center_update()
    assert loss.center.dtype == torch.float32
    assert loss(torch.randn(2, 3, 16, dtype=dtype), torch.randn(4, 3, 16, dtype=dtype)).isfinite()
    assert loss.center.dtype == torch.float32


def test_the_center_is_part_of_the_state():
    loss = DINOLoss(16)
    loss.center.normal_()
    other = copy.deepcopy(loss)
    other.center.zero_()
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.center, loss.center)


@KINDS
@pytest.mark.parametrize("shape", [(16,), (1, 16), (1, 1, 16)])
def test_centers_of_other_libraries_load(kind, shape):
    loss, center = kind(16), torch.randn(16)
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


@KINDS
def test_a_center_of_another_size_is_refused(kind):
    with pytest.raises(RuntimeError, match=r"(?s)loss.center has 8 prototypes, but .* output_dim=16: .*size mismatch"):
        torch.nn.ModuleDict({"loss": kind(16)}).load_state_dict({"loss.center": torch.zeros(8)})


@pytest.mark.parametrize(("saved", "loaded", "message"), [
    ("mean", "sinkhorn", r'Unexpected .*"loss.center: .* set DINOLoss\(centering="mean"\), or drop .* strict=False'),
    ("sinkhorn", "mean", r'Missing .*"loss.center: .* set DINOLoss\(centering="sinkhorn"\), or start .* strict=False'),
])  # fmt: skip
def test_a_state_of_the_other_centering_names_the_option_to_set(saved, loaded, message):
    state = torch.nn.ModuleDict({"loss": DINOLoss(16, centering=saved)}).state_dict()
    module = torch.nn.ModuleDict({"loss": DINOLoss(16, centering=loaded)})
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    keys = module.load_state_dict(state, strict=False)
    assert [*keys.missing_keys, *keys.unexpected_keys] == ["loss.center"]
    assert str(keys).count("loss.center:") == 0


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_a_loss_made_on_the_meta_device_starts_with_a_center_of_0(centering):
    with torch.device("meta"):
        loss = DINOLoss(16, centering=centering)
    loss.to_empty(device="cpu")
    if loss.center is not None:
        loss.center.fill_(3.0)
    loss.reset_parameters()
    assert loss.center is None or not loss.center.any()
    assert loss(torch.ones(2, 3, 16), torch.zeros(4, 3, 16)).isfinite()


def test_the_centering_of_a_loss_is_fixed():
    for centering in ("mean", "sinkhorn"):
        loss = DINOLoss(16, centering=centering)
        assert copy.deepcopy(loss).centering == centering
        with pytest.raises(AttributeError):
            loss.centering = "mean"


def test_the_center_is_float32_whatever_the_default_type():
    """Lightning changes it while a module is made for bf16-true."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = DINOLoss(16)
        loss(torch.ones(2, 3, 16), torch.zeros(4, 3, 16))
    finally:
        torch.set_default_dtype(default)
    assert loss.center.dtype == torch.float32
    torch.testing.assert_close(loss.center, torch.full((1, 1, 16), 0.1))


@pytest.mark.parametrize(
    "teacher", [torch.zeros(2, 3, 8), [torch.zeros(3, 8)] * 2, FactoredLogits(torch.zeros(2, 3, 4), torch.zeros(8, 4))]
)
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_a_head_of_another_size_is_refused(teacher, centering):
    with pytest.raises(ValueError, match=r"made for 16 prototypes \(output_dim\), got a teacher with 8: give loss and"):
        DINOLoss(16, centering=centering)(teacher, torch.zeros(4, 3, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dim": 0}, "output_dim must be an integer >= 1"),
        ({"teacher_temp": 0.0}, r"teacher_temp must be a number in \(0, inf\], got 0.0"),
        ({"student_temp": -1}, "student_temp must be a number"),
        ({"warmup_teacher_temp": float("nan")}, "warmup_teacher_temp must be a number"),
        ({"center_momentum": 1.5}, r"center_momentum must be a number in \[0, 1\], got 1.5"),
        ({"centering": "swav"}, 'centering must be "mean" or "sinkhorn", got \'swav\''),
        ({"warmup_teacher_temp_epochs": -1}, "warmup_teacher_temp_epochs must be an integer >= 0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DINOLoss(**options)


def test_an_epoch_is_not_negative():
    with pytest.raises(ValueError, match=r"epoch must be an integer >= 0 \(such as self.current_epoch\), got -1"):
        DINOLoss(16)(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), epoch=-1)


@pytest.mark.parametrize("epoch", [torch.tensor(3), 0.04])
def test_an_epoch_is_an_integer(epoch):
    with pytest.raises(ValueError, match=r"epoch must be an integer >= 0 .* got "):
        DINOLoss(16)(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), epoch)


def test_a_temperature_by_step_is_checked():
    with pytest.raises(ValueError, match="teacher_temp must be a number"):
        DINOLoss(16)(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), teacher_temp=0)


def test_a_momentum_that_is_set_later_is_checked_too():
    loss = DINOLoss(16)
    loss.center_momentum = 3.0
    with pytest.raises(ValueError, match=r"center_momentum must be a number in \[0, 1\], got 3.0"):
        loss(torch.randn(2, 3, 16), torch.randn(2, 3, 16))


# Masked patches.


def patches(masked, seed=0):
    """Outputs of both sides (M, 16), of which the student's require gradients, and masks of 4 views of 8 patches."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(3, 7, dtype=torch.bool)
    masks.view(-1)[torch.randperm(21, generator=generator)[:masked]] = True
    masks = torch.nn.functional.pad(masks, (0, 1, 1, 0))
    teacher, student = torch.randn(2, masked, 16, generator=generator)
    return teacher, student.requires_grad_(), masks


def test_the_patch_loss_follows_the_epoch_like_the_dino_loss():
    teacher, student, masks = patches(9)
    loss = IBOTPatchLoss(16, 0.04, 0.07, 4).eval()
    dense = [rows.new_zeros(*masks.shape, 16).index_put((masks,), rows.detach()) for rows in (teacher, student)]
    for epoch, temp in ((0, 0.04), (1, 0.05), (3, 0.07), (None, 0.07)):
        expected = reference_ibot_patch_loss(*dense, masks, teacher_temp=temp).item()
        assert loss(teacher, student, masks, epoch).item() == pytest.approx(expected, rel=1e-6)
        assert loss(teacher, student, masks, 0, teacher_temp=temp).item() == pytest.approx(expected, rel=1e-6)


def test_masks_may_have_the_shape_of_the_grid():
    teacher, student, masks = patches(9)
    loss = IBOTPatchLoss(16).eval()
    assert loss(teacher, student, masks.view(4, 2, 4)).item() == loss(teacher, student, masks).item()


def test_the_patch_center_is_the_mean_over_all_patches_by_number():
    loss = IBOTPatchLoss(16)
    loss.defer_center_update = True
    calls = [patches(masked, seed) for seed, masked in enumerate((1, 9, 0, 5))]
    for teacher, student, masks in calls:
        loss(teacher, student, masks)
        assert not loss.center.any()
    loss.apply_center_update()
    mean = torch.cat([teacher for teacher, *_ in calls]).mean(dim=0)
    torch.testing.assert_close(loss.center.flatten(), 0.1 * mean)
    loss.eval()(*calls[1])
    loss.apply_center_update()
    torch.testing.assert_close(loss.center.flatten(), 0.1 * mean)


@pytest.mark.parametrize("training", [True, False])
def test_sinkhorn_balances_the_masked_patches(training):
    teacher, student, masks = patches(9)
    mass = (teacher.double() / 0.07).exp()
    for _ in range(3):
        mass = mass / mass.sum(dim=0)
        mass = mass / mass.sum(dim=1, keepdim=True)
    entropies = -(mass * (student.double() / 0.1).log_softmax(dim=-1)).sum(dim=-1)
    counts = masks.sum(dim=1)
    expected = (entropies / counts.repeat_interleave(counts)).sum() / 4
    loss = IBOTPatchLoss(16, centering="sinkhorn").train(training)
    assert loss(teacher, student, masks).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_two_processes_with_unequal_numbers_of_patches_equal_one(centering, tmp_path):
    """The second process has no masked patch in every second call."""
    calls = [[patches(masked, seed) for masked in pair] for seed, pair in enumerate(((9, 2), (5, 0), (1, 12)))]
    calls = [[(teacher, student.detach(), masks) for teacher, student, masks in pair] for pair in calls]
    torch.save((centering, calls), tmp_path / "input.pt")
    joined = [[torch.cat(parts) for parts in zip(*pair, strict=True)] for pair in calls]
    expected = distributed_parts.patch_objective(IBOTPatchLoss(16, centering=centering), joined)
    ranks = run_in_processes(distributed_parts.patch_objective_of_my_views, tmp_path)
    for call, value in enumerate(expected["losses"]):
        torch.testing.assert_close((ranks[0]["losses"][call] + ranks[1]["losses"][call]) / 2, value)
        gradients = torch.cat([rank["gradients"][call] / 2 for rank in ranks])
        torch.testing.assert_close(gradients, expected["gradients"][call], rtol=1e-5, atol=1e-7)
    for rank in ranks:
        torch.testing.assert_close(rank["center"], expected["center"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_a_patch_head_of_another_size_is_refused(centering):
    _, student, masks = patches(9)
    with pytest.raises(ValueError, match=r"made for 8 prototypes \(output_dim\), got a teacher with 16: give loss and"):
        IBOTPatchLoss(8, centering=centering)(student.detach(), student, masks)
