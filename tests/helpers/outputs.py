"""Outputs of both sides, as logits and as factors."""

import torch
from torch.nn import functional as F

from dino_head import FactoredLogits


def factors(views_t=2, views_s=5, samples=7, width=16, outputs=200, dtype=torch.float32):
    """Both sides; the student's tensors require gradients."""
    torch.manual_seed(0)
    sides = []
    for views in (views_t, views_s):
        z = F.normalize(torch.randn(views, samples, width, dtype=torch.float64), dim=-1)
        prototypes = F.normalize(torch.randn(outputs, width, dtype=torch.float64), dim=-1)
        sides.append(FactoredLogits(z.to(dtype), prototypes.to(dtype)))
    center = 0.1 * torch.randn(1, 1, outputs, dtype=torch.float64).to(dtype)
    for tensor in sides[1]:
        tensor.requires_grad_()
    return *sides, center


def logits(*shape):
    return torch.zeros(shape)


def factored(views, samples, width, outputs):
    return FactoredLogits(torch.zeros(views, samples, width), torch.zeros(outputs, width))


def low_precision_loop(teacher, student, center=0.0, teacher_temp=0.07, student_temp=0.1):
    """The usual form: products in the logits' own precision, probabilities in float32 at least."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    p = ((teacher.to(dtype) - center) / teacher_temp).softmax(dim=-1)
    log_q = (student.to(dtype) / student_temp).log_softmax(dim=-1)
    pairs = [(t, s) for t in range(len(p)) for s in range(len(log_q)) if s != t]
    return torch.stack([-(p[t] * log_q[s]).sum(dim=-1).mean() for t, s in pairs]).mean()
