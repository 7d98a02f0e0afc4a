from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.operations import Watch
from helpers.outputs import factored, factors, logits
from torch.nn import functional as F

from dino_head import DINOLoss, FactoredLogits, IBOTPatchLoss, dino_loss, ibot_patch_loss
from dino_head.functional import sinkhorn_center
from dino_head.functional.dino import reference_dino_loss
from dino_head.functional.ibot import patch_weights, reference_ibot_patch_loss

REFERENCE = Path(__file__).parents[1] / "reference" / "ibot_dinov2.npz"
OPTIONS = {"teacher_temp": 0.07, "student_temp": 0.1}


@pytest.fixture(scope="module")
def authors():
    with np.load(REFERENCE) as values:
        return {name: torch.from_numpy(value) for name, value in values.items()}


def masks_of(views=6, patches=12, masked=25, seed=0):
    """Random masks with this many masked patches, none of them on all patches of a view; the last view has none."""
    order = torch.randperm((views - 1) * (patches - 1), generator=torch.Generator().manual_seed(seed))
    masks = torch.zeros(views, patches, dtype=torch.bool)
    masks[:-1, 1:] = (order < masked).view(views - 1, patches - 1)
    return masks


def tokens(masked=25, width=16, outputs=200, dtype=torch.float32):
    """Both sides, (M, D) and (K, D); the student's tensors require gradients."""
    teacher, student, center = factors(1, 1, masked, width, outputs, dtype)
    student = FactoredLogits(student.z[0].detach().requires_grad_(), student.prototypes)
    return FactoredLogits(teacher.z[0], teacher.prototypes), student, center.flatten()


def on_all_patches(rows, masks):
    """(M, ...) -> (V, N, ...), zero where not masked."""
    return rows.new_zeros(*masks.shape, *rows.shape[1:]).index_put((masks,), rows)


def test_the_plain_reference_equals_the_authors_values(authors):
    student = authors["student"].clone().requires_grad_()
    loss = reference_ibot_patch_loss(
        authors["teacher"], student, authors["mask"], teacher_temp=authors["teacher_temp"].item()
    )
    loss.backward()
    torch.testing.assert_close(loss.float(), authors["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, authors["grad_student"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["logits", "factored"])
def test_loss_gradient_and_center_equal_the_authors_values(authors, kind):
    student, masks = authors["student"].clone().requires_grad_(), authors["mask"]
    sides = [authors["teacher"][masks], student[masks]]
    if kind == "factored":  # as many prototypes as directions
        sides = [FactoredLogits(side, torch.eye(side.shape[-1])) for side in sides]
    loss = IBOTPatchLoss(student.shape[-1])
    value = loss(*sides, masks, teacher_temp=authors["teacher_temp"].item())
    value.backward()
    torch.testing.assert_close(value, authors["loss"], rtol=1e-5, atol=0)
    expected = authors["grad_student"]
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(loss.center.flatten(), authors["center_after"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens_in_a_block", [0, 1, 4, 25])  # 0: not even one fits
def test_loss_and_gradients_from_logits_and_from_blocks_equal_the_plain_reference(tokens_in_a_block):
    masks = masks_of()
    truth_t, truth_s, truth_center = tokens(dtype=torch.float64)
    truth = reference_ibot_patch_loss(
        on_all_patches(truth_t.logits(), masks), on_all_patches(truth_s.logits(), masks), masks, center=truth_center
    )
    gradients = torch.autograd.grad(truth, truth_s)
    teacher, student, center = tokens()
    weights = patch_weights(masks, 25)
    size = max(1, tokens_in_a_block * 2 * 200 * 4)
    for out in ((teacher, student), (teacher.logits(), student.logits())):
        value = ibot_patch_loss(*out, weights, center=center, block_bytes=size, **OPTIONS)
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
        for ours, expected in zip(torch.autograd.grad(value, student), gradients, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_one_kernel_computes_both_losses():
    """With equal weights, the loss of masked patches is the DINO loss of one pair of views."""
    teacher, student, center = tokens()
    views = FactoredLogits(torch.stack([torch.zeros_like(student.z), student.z]), student.prototypes)
    pair = dino_loss(FactoredLogits(teacher.z[None], teacher.prototypes), views, center=center)
    weights = torch.full((25,), 1 / 25)
    value = ibot_patch_loss(teacher, student, weights, center=center)
    torch.testing.assert_close(value, pair, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(value, student), torch.autograd.grad(pair, student))


def test_gradients_in_float64():
    teacher, student, center = tokens(5, 4, 6, torch.float64)
    weights = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(z, prototypes):
        return ibot_patch_loss(teacher, FactoredLogits(z, prototypes), weights, center=center, block_bytes=2 * 2 * 48)

    assert torch.autograd.gradcheck(loss, tuple(student))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
def test_weights_scale_loss_and_gradients_at_any_size_in_float16(scale):
    """Small weights must not vanish in products of low precision."""
    teacher, student, _ = tokens(64, outputs=1000)
    weights = torch.rand(64, generator=torch.Generator().manual_seed(0))
    truth = ibot_patch_loss(teacher, student, weights)
    gradients = torch.autograd.grad(truth, student)
    with torch.autocast("cpu", torch.float16):
        value = ibot_patch_loss(teacher, student, scale * weights)
    torch.testing.assert_close(value / scale, truth, rtol=1e-3, atol=0)
    for ours, expected in zip(torch.autograd.grad(value, student), gradients, strict=True):
        assert (ours / scale - expected).norm() < 0.01 * expected.norm()


def test_weights_may_have_any_sign():
    teacher, student, _ = tokens(4)
    for weights in (-torch.ones(4), torch.tensor([1.0, -2.0, 0.0, 3.0])):
        parts = torch.stack([ibot_patch_loss(teacher, student, row) for row in weights.diag()])
        torch.testing.assert_close(ibot_patch_loss(teacher, student, weights), parts.sum())


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
@pytest.mark.parametrize("kind", ["logits", "factored"])
def test_without_masked_patches_loss_and_gradients_are_0_and_the_center_stays(kind, centering):
    teacher, student, _ = tokens(0)
    leaves = tuple(student) if kind == "factored" else (student.logits().detach().requires_grad_(),)
    out = (teacher, student) if kind == "factored" else (teacher.logits(), *leaves)
    loss = IBOTPatchLoss(200, centering=centering)
    if loss.center is not None:
        loss.center.normal_()
    before = None if loss.center is None else loss.center.clone()
    value = loss(*out, torch.zeros(4, 12, dtype=torch.bool))
    value.backward()
    assert value.item() == 0
    assert [tuple(leaf.grad.shape) for leaf in leaves] == [tuple(leaf.shape) for leaf in leaves]
    assert not any(leaf.grad.any() for leaf in leaves)
    assert before is None or torch.equal(loss.center, before)


@pytest.mark.parametrize("work", ["loss", "sinkhorn"])
def test_no_more_than_a_block_of_logits_is_in_memory(work):
    teacher, student, _ = tokens(512, outputs=2000)
    budget, weights = 64 * 2 * 2000 * 4, torch.ones(512)

    def run(*sides):
        if work == "loss":
            ibot_patch_loss(*sides, weights, block_bytes=budget)
        else:
            sinkhorn_center(FactoredLogits(sides[0].z[None], sides[0].prototypes), 0.1, block_bytes=budget)

    with Watch() as watch:
        run(teacher, student)
    assert 2000 * 16 < watch.largest <= budget // 4
    with Watch() as watch:
        ibot_patch_loss(teacher.logits(), student.logits(), weights)
    assert watch.largest >= 512 * 2000  # it can fail


def test_only_the_four_products_of_a_forward_and_backward_are_computed():
    teacher, student, _ = tokens()
    with Watch() as watch:
        ibot_patch_loss(teacher, student, torch.ones(25)).backward()
    assert watch.products == 4


# The value, of both losses.


@pytest.mark.parametrize("outputs", [5, 4096, pytest.param(65_536, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.1, 0.3, 1.0, 3.0, 100.0, 1e4])
def test_losses_are_within_1e_6_of_float64_at_any_scale_of_the_logits(scale, outputs):
    torch.manual_seed(0)
    teacher, student = scale * torch.randn(2, 12, outputs), scale * torch.randn(4, 12, outputs)
    center = 0.1 * scale * torch.randn(outputs)
    expected = reference_dino_loss(teacher, student, center=center).item()
    assert dino_loss(teacher, student, center=center).item() == pytest.approx(expected, rel=1e-6)
    masks = torch.ones(1, 12, dtype=torch.bool)
    expected = reference_ibot_patch_loss(teacher[:1], student[1:2], masks, center=center).item()
    value = ibot_patch_loss(teacher[0], student[1], torch.full((12,), 1 / 12), center=center)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_equal_sides_with_large_logits_have_a_loss_of_0():
    logits = (torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(7)) * 10).repeat(2, 1, 1)
    assert 0 <= dino_loss(logits, logits).item() < 1e-12
    assert 0 <= ibot_patch_loss(logits[0], logits[1], torch.ones(3)).item() < 1e-12


# Compiled.


def compiled(work):
    """`work` compiled without a graph break, and the list of its compilations."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    return torch.compile(work, backend=backend, fullgraph=True), compilations


compiles = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated"),  # the compiler's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # the compiler looks at all attributes
]


@pytest.mark.parametrize("centering", [pytest.param(name, marks=compiles) for name in ("mean", "sinkhorn")])
def test_other_numbers_of_masked_patches_do_not_compile_again(centering):
    torch.compiler.reset()
    loss = IBOTPatchLoss(200, centering=centering)
    loss.defer_center_update = True
    work, compilations = compiled(loss.forward)
    for number, masked in enumerate(range(5, 20)):
        masks, (teacher, student, _) = masks_of(masked=masked, seed=number), tokens(masked)
        value, expected = work(teacher, student, masks), loss(teacher, student, masks)
        torch.testing.assert_close(value, expected)
        gradients = torch.autograd.grad(value, student), torch.autograd.grad(expected, student)
        torch.testing.assert_close(*gradients)
    assert len(compilations) <= 2


@pytest.mark.parametrize("centering", [pytest.param(name, marks=compiles) for name in ("mean", "sinkhorn")])
@pytest.mark.parametrize("kind", ["logits", "factored"])
def test_other_batch_sizes_do_not_compile_again(kind, centering):
    torch.compiler.reset()
    loss = DINOLoss(200, centering=centering)
    loss.defer_center_update = True
    work, compilations = compiled(loss.forward)
    for samples in range(2, 14):
        teacher, student, _ = factors(samples=samples)
        out = (teacher, student) if kind == "factored" else (teacher.logits(), student.logits())
        torch.testing.assert_close(work(*out), loss(*out))
    assert len(compilations) <= 2


# Bad input.


@pytest.mark.parametrize(
    ("teacher", "student", "weights", "message"),
    [
        (logits(3, 16), logits(4, 16), torch.ones(4), r"the same B and K, got teacher \(1, 3, 16\) and student \(1, 4"),
        (logits(3, 16), logits(3, 8), torch.ones(3), "the same B and K"),
        (logits(3, 16), FactoredLogits(logits(3, 4), logits(16, 4)), torch.ones(3), "must both be logits or both Fac"),
        (logits(2, 3, 16), logits(2, 3, 16), torch.ones(3), r"logits \(M, K\) of the M masked patches alone, got \(2"),
        (factored(2, 3, 4, 16), factored(2, 3, 4, 16), torch.ones(3), r"expects z \(M, D\) of the M masked patches"),
        ([logits(3, 16)], logits(3, 16), torch.ones(3), r"logits \(M, K\) or one FactoredLogits .*, got a list: pass"),
        (logits(3, 16), logits(3, 16), torch.ones(4), r"for each of M = 3 patches, got \(4,\) in torch.float32"),
        (logits(3, 16), logits(3, 16), torch.ones(3).long(), r"got \(3,\) in torch.int64: IBOTPatchLoss computes them"),
        (logits(3, 16), logits(3, 16), 1.0, "got float"),
        (logits(3, 16), logits(3, 16).long(), torch.ones(3), "floating-point logits, got torch.int64"),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit_raise(teacher, student, weights, message):
    with pytest.raises(ValueError, match=message):
        ibot_patch_loss(teacher, student, weights)


def test_swapped_sides_are_named():
    teacher, student = torch.randn(3, 16), torch.randn(3, 16, requires_grad=True)
    with pytest.raises(ValueError, match="teacher_out requires a gradient and student_out does not"):
        ibot_patch_loss(student, teacher, torch.ones(3))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            torch.zeros(4, 12),
            r"boolean tensor \(V, N\) .*, got \(4, 12\) in torch.float32: make them with random_block",
        ),
        (torch.zeros(12, dtype=torch.bool), r"got \(12,\) in torch.bool"),
        ([[True]], "got list"),
        (masks_of(masked=24), r"masks \(6, 12\) mask 24 patches, got outputs of 25: pass the outputs of the masked"),
        (F.pad(torch.ones(2, 12), (0, 0, 0, 2)).bool()[:, :12], "mask 24 patches, got outputs of 25"),
        (F.one_hot(torch.zeros(25, dtype=torch.long), 2).bool()[:, :1].repeat(1, 1), "25 of 25 views have a mask on"),
    ],
)
def test_masks_that_do_not_fit_raise(masks, message):
    with pytest.raises(ValueError, match=message):
        IBOTPatchLoss(16)(logits(25, 16), logits(25, 16), masks)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_nan_in_one_patch_makes_the_loss_nan(centering):
    teacher, student = torch.randn(25, 16), torch.randn(25, 16)
    for side in (teacher, student):
        broken = side.clone()
        broken[3, 2] = torch.nan
        out = (broken, student) if side is teacher else (teacher, broken)
        assert IBOTPatchLoss(16, centering=centering)(*out, masks_of()).isnan()
