import pytest
import torch
from helpers.outputs import factored, factors, logits

from dino_head import FactoredLogits, dino_loss
from dino_head.functional._outputs import as_outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_logits_from_factors(dtype):
    teacher, _, _ = factors()
    expected = teacher.logits().double().sum(dim=(0, 1)).float()
    out = FactoredLogits(*(tensor.to(dtype) for tensor in teacher))
    with torch.autocast("cpu", torch.bfloat16):
        found = (as_outputs(out).sum_of_logits(), as_outputs(teacher.logits().float()).sum_of_logits())
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.float32]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert as_outputs(teacher.logits()).sum_of_logits().dtype == torch.float32


POOL = r"pool the backbone's outputs before the head, tokens \(B, N, D\) with tokens\[:, 0\] .* maps.flatten"


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (logits(2, 3, 16), logits(4, 5, 16), "the same B and K"),
        (logits(2, 3, 16), logits(4, 3, 8), "the same B and K"),
        (factored(2, 3, 4, 16), factored(4, 5, 4, 16), "the same B and K"),
        (factored(2, 3, 4, 16), factored(4, 3, 4, 8), "the same B and K"),
        (logits(4, 3, 16), logits(2, 3, 16), "at least as many"),
        (factored(4, 3, 4, 16), factored(2, 3, 4, 16), "at least as many"),
        (logits(1, 3, 16), logits(1, 3, 16), "no pair of different views"),
        (factored(1, 3, 4, 16), factored(1, 3, 4, 16), "no pair of different views"),
        ([logits(3, 16)], [logits(3, 16)], "no pair of different views"),
        (logits(2, 0, 16), logits(4, 0, 16), "at least one sample"),
        (factored(2, 0, 4, 16), factored(4, 0, 4, 16), "at least one sample"),
        (logits(6, 16), logits(12, 16), r"expects logits \(V, B, K\) of V views, got \(6, 16\): stack"),
        (FactoredLogits(logits(6, 4), logits(16, 4)), factored(4, 3, 4, 16), r"expects z \(V, B, D\) of V views, got"),
        (FactoredLogits(logits(2, 3, 4), logits(16, 5)), factored(4, 3, 4, 16), r"of the same D, got \(2, 3, 4\) and"),
        (FactoredLogits(logits(2, 3, 16), None), logits(4, 3, 16), r"got \['Tensor', 'NoneType'\]: use head.factored"),
        (logits(2, 3, 16), factored(4, 3, 4, 16), "or both FactoredLogits, got logits and FactoredLogits"),
        (logits(2, 3, 16).long(), logits(4, 3, 16), "floating-point logits, got torch.int64"),
        ([], logits(4, 3, 16), r"views must be a list of logits \(B, K\) of one shape, got \[\]"),
        ([logits(3, 16), logits(4, 16)], logits(4, 3, 16), r"of one shape, got \[\(3, 16\), \(4, 16\)\]"),
        (None, logits(4, 3, 16), r"of one shape, got \['NoneType'\]: pass a tensor"),
        ([factored(1, 3, 4, 16)] * 2, logits(4, 3, 16), "one FactoredLogits with the z of all views"),
        (logits(6, 16), logits(12, 16), r"or separate the rows of all views with .unflatten\(0, \(V, B\)\)"),
        (torch.zeros(2, 3, 5, 16), torch.zeros(4, 3, 5, 16), rf"of V views, got \(2, 3, 5, 16\): {POOL}"),
        (FactoredLogits(torch.zeros(2, 3, 5, 4), logits(16, 4)), factored(4, 3, 4, 16), rf"got \(2, 3, 5, 4\): {POOL}"),
        ([torch.zeros(3, 5, 16)] * 2, logits(4, 3, 16), rf"got \(2, 3, 5, 16\): {POOL}"),
        ([torch.zeros(3, 5, 16), torch.zeros(3, 2, 16)], logits(4, 3, 16), rf"\(3, 5, 16\), \(3, 2, 16\)\]: {POOL}"),
        ({"logits": logits(2, 3, 16)}, logits(4, 3, 16), "outputs of the head, got a dict with the keys 'logits'"),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit_raise(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        dino_loss(teacher, student)


def test_swapped_sides_are_named():
    student, teacher = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16)
    with pytest.raises(ValueError, match="teacher_out requires a gradient and student_out does not"):
        dino_loss(student, teacher)
    with torch.no_grad():
        assert dino_loss(student, teacher).isfinite()
