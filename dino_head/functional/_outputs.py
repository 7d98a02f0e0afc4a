"""One internal form for both kinds of head output, logits and FactoredLogits.

Sizes: V views, B samples, K prototypes, D bottleneck width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_head._pooling import MAPS, TOKENS, how_to_pool
from dino_head.prototypes import FactoredLogits


class Outputs(NamedTuple):
    """The outputs of all views of one side.

    Args:
        rows: Unit vectors (V, B, D) if there are prototypes, else logits (V, B, K).
        prototypes: Prototypes (K, D), or None.
    """

    rows: Tensor
    prototypes: Tensor | None = None

    @property
    def views(self) -> int:
        """V."""
        return self.rows.shape[0]

    @property
    def samples(self) -> int:
        """B."""
        return self.rows.shape[1]

    @property
    def output_dim(self) -> int:
        """K."""
        return self.rows.shape[2] if self.prototypes is None else len(self.prototypes)

    @property
    def tensors(self) -> list[Tensor]:
        """The one or two tensors."""
        return [self.rows] if self.prototypes is None else [self.rows, self.prototypes]

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors requires a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def product_dtype(self) -> torch.dtype:
        """Type of the product of the tensors: autocast's type, or the promoted type if autocast is off."""
        dtype, device = self.tensors[0].dtype, self.rows.device.type
        for tensor in self.tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        is_cast = torch.is_autocast_enabled(device) and dtype != torch.float64
        return torch.get_autocast_dtype(device) if is_cast else dtype

    def detach(self) -> "Outputs":
        """The same values without gradients."""
        return Outputs(*(tensor.detach() for tensor in self.tensors))

    def cpu(self) -> "Outputs":
        """The same values in main memory."""
        return Outputs(*(tensor.cpu() for tensor in self.tensors))

    def is_finite(self) -> Tensor:
        """Whether all values are finite: a boolean scalar on the device."""
        return torch.stack([tensor.isfinite().all() for tensor in self.tensors]).all()

    def logits_of(self, samples: Tensor) -> Tensor:
        """Logits (V, b, K) of the samples with these indices (b,), in float32 or higher."""
        rows = self.rows[:, samples]
        if self.prototypes is None:
            return rows.to(torch.promote_types(rows.dtype, torch.float32))
        return F.linear(rows.float(), self.prototypes.float())

    def sum_of_logits(self) -> Tensor:
        """Sum of the logits over views and samples, (K,) in float32; unit vectors are summed before the product."""
        rows = self.rows.sum(dim=(0, 1), dtype=torch.float32)
        if self.prototypes is None:
            return rows
        with torch.autocast(rows.device.type, enabled=False):
            return self.prototypes.float() @ rows


STACKED = "pass a tensor (V, B, K), a list of tensors (B, K), or one FactoredLogits with the z of all views, (V, B, D)"
POOL_FIRST = (
    f"pool the backbone's outputs before the head, tokens (B, N, D) with {TOKENS} and maps (B, D, H, W) with {MAPS}"
)

# Types that public functions and modules accept for views; internally, only `Outputs` is used.
Logits = Tensor | Sequence[Tensor] | FactoredLogits | Outputs


def as_outputs(out: Logits) -> Outputs:
    """Check the outputs of one side and convert them to `Outputs`.

    Raises:
        ValueError: A kind, shape or type that `Logits` does not allow, or no sample.
    """
    if isinstance(out, Outputs):
        return out
    outputs = _from_factors(out) if isinstance(out, FactoredLogits) else Outputs(_stack(out))
    kind = "logits (V, B, K)" if outputs.prototypes is None else "z (V, B, D)"
    shape = tuple(outputs.rows.shape)
    if len(shape) > 3:
        raise ValueError(f"the loss expects {kind} of V views, got {shape}: {POOL_FIRST}")
    if len(shape) != 3:
        raise ValueError(
            f"the loss expects {kind} of V views, got {shape}: stack the views first, or separate the rows of all "
            "views with .unflatten(0, (V, B))"
        )
    if 0 in shape:
        raise ValueError(f"the loss needs at least one sample, got {kind} of shape {shape}: skip empty batches")
    _check_tensors(outputs)
    return outputs


def as_token_outputs(out: Tensor | FactoredLogits | Outputs) -> Outputs:
    """Check the outputs of the masked patches of one side and convert them to `Outputs` of one view with M samples.

    Raises:
        ValueError: Other outputs than logits (M, K) or FactoredLogits with z (M, D); M may be 0.
    """
    if isinstance(out, Outputs):
        return out
    if not isinstance(out, (Tensor, FactoredLogits)):
        raise ValueError(
            f"the loss of masked patches expects logits (M, K) or one FactoredLogits with z (M, D), got a "
            f"{type(out).__name__}: pass the patch head's output for the masked patches of all views"
        )
    outputs = _from_factors(out) if isinstance(out, FactoredLogits) else Outputs(out)
    kind = "logits (M, K)" if outputs.prototypes is None else "z (M, D)"
    shape = tuple(outputs.rows.shape)
    if len(shape) != 2:
        raise ValueError(
            f"the loss of masked patches expects {kind} of the M masked patches alone, got {shape}: pick their tokens "
            "before the head, with tokens.flatten(0, 1).index_select(0, masks.flatten().nonzero().squeeze(1))"
        )
    _check_tensors(outputs)
    return Outputs(outputs.rows[None], outputs.prototypes)


def check_sides(teacher: Outputs, student: Outputs) -> None:
    """Raise ValueError unless the outputs of both sides match."""
    if len(teacher.tensors) != len(student.tensors):
        kinds = ["logits" if side.prototypes is None else "FactoredLogits" for side in (teacher, student)]
        raise ValueError(
            f"teacher and student must both be logits or both FactoredLogits, got {kinds[0]} and {kinds[1]}: call "
            "head.factored_logits on both sides, or the head itself"
        )
    if (teacher.samples, teacher.output_dim) != (student.samples, student.output_dim):
        raise ValueError(f"teacher and student must have the same B and K, {_given(teacher, student)}")
    if torch.is_grad_enabled() and teacher.requires_grad and not student.requires_grad:
        raise ValueError(
            "teacher_out requires a gradient and student_out does not, so that nothing would be trained: pass the "
            "teacher's outputs first, and compute them under torch.no_grad()"
        )


def check_views(teacher: Outputs, student: Outputs) -> None:
    """Raise ValueError unless there is a pair of different views, and the student has all of the teacher's."""
    if teacher.views > student.views:
        raise ValueError(
            f"the student must see the teacher's views first and at least as many of them, {_given(teacher, student)}: "
            "pass views in the order global, local on both sides"
        )
    if teacher.views == student.views == 1:
        raise ValueError(
            f"one view on each side leaves no pair of different views, {_given(teacher, student)}: add a view"
        )


def _given(teacher: Outputs, student: Outputs) -> str:
    sizes = [(side.views, side.samples, side.output_dim) for side in (teacher, student)]
    return f"got teacher {sizes[0]} and student {sizes[1]} as (views, B, K)"


def _from_factors(out: FactoredLogits) -> Outputs:
    if not all(isinstance(tensor, Tensor) for tensor in out):
        kinds = [type(tensor).__name__ for tensor in out]
        raise ValueError(f"FactoredLogits expects tensors z and prototypes, got {kinds}: use head.factored_logits")
    return Outputs(*out)


def _check_tensors(outputs: Outputs) -> None:
    width, prototypes = outputs.rows.shape[-1], outputs.prototypes
    if prototypes is not None and (prototypes.dim() != 2 or prototypes.shape[1] != width):
        raise ValueError(
            f"FactoredLogits expects z (..., D) and prototypes (K, D) of the same D, got {tuple(outputs.rows.shape)} "
            f"and {tuple(prototypes.shape)}: take both from head.factored_logits"
        )
    for tensor in outputs.tensors:
        if not tensor.is_floating_point():
            raise ValueError(f"the loss expects floating-point logits, got {tensor.dtype}: convert with .float()")


def flat_center(center: Tensor | float, output_dim: int) -> Tensor | float:
    """A center as (K,) or as a number.

    Raises:
        ValueError: A tensor that does not have K values.
    """
    if not isinstance(center, Tensor):
        return center
    if center.numel() != output_dim:
        raise ValueError(
            f"center must be a number or have one value for each of K = {output_dim} prototypes, got "
            f"{tuple(center.shape)}: give loss and head the same output_dim"
        )
    return center.flatten()


def _stack(out: Any) -> Tensor:
    """Logits (V, B, K), or a list of V tensors (B, K), as one tensor."""
    if isinstance(out, Tensor):
        return out
    if isinstance(out, Mapping):  # also an output of Transformers
        raise ValueError(f"the loss expects the outputs of the head, got {how_to_pool(out)}")
    views: list[Any] = list(out) if isinstance(out, (list, tuple)) else [out]
    if not views or not all(isinstance(view, Tensor) and view.shape == views[0].shape for view in views):
        given = [tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__ for view in views]
        is_pooled = not any(isinstance(view, Tensor) and view.ndim > 2 for view in views)
        remedy = STACKED if is_pooled else POOL_FIRST
        raise ValueError(f"views must be a list of logits (B, K) of one shape, got {given}: {remedy}")
    return torch.stack(views)
