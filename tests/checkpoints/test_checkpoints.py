"""Heads from and to the layouts of other projects. test_files.py tests the kinds of files."""

import argparse
import copy
import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dino_head import DINOProjectionHead
from dino_head.checkpoints import export_head, load_head

WEIGHT_NORMED = ("dino", "lightly", "lightly-train")
LAYOUTS = (*WEIGHT_NORMED, "dinov3")


def head_like(seed=0, **options) -> DINOProjectionHead:
    """A head in which every value differs from its initial one, except fixed norms."""
    torch.manual_seed(seed)
    head = DINOProjectionHead(**{"input_dim": 6, "hidden_dim": 8, "bottleneck_dim": 4, "output_dim": 12} | options)
    for parameter in head.parameters():
        if parameter.requires_grad:
            parameter.data.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, parameter.shape) * 2 - 1)
    for name, buffer in head.named_buffers():
        if not name.endswith("weight_g"):
            buffer.copy_(torch.randint(1, 9, buffer.shape) if "num_" in name else torch.rand(buffer.shape) + 0.5)
    return head


def bitwise_equal(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def outputs(head):
    return copy.deepcopy(head).eval()(torch.randn(5, head.input_dim, generator=torch.Generator().manual_seed(3)))


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


# Checkpoints of other projects, made of the state dicts of two heads.

BACKBONE = {"backbone.blocks.0.mlp.fc1.weight": torch.ones(3, 3), "backbone.norm.weight": torch.ones(3)}
CHECKPOINTS = {
    "DINO": lambda teacher, student: {
        "student": under("module.", BACKBONE) | under("module.head.", student),
        "teacher": BACKBONE | under("head.", teacher),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_small", lr=0.1),
        "dino_loss": {"center": torch.zeros(1, 12)},
    },
    "DINO, with batch norm": lambda teacher, student: {
        "student": under("module.head.", student),
        "teacher": under("module.", BACKBONE) | under("module.head.", teacher),
    },
    "DINOv2, training": lambda teacher, student: {
        "model": under("student.dino_head.", student) | under("teacher.dino_head.", teacher),
        "iteration": 4,
    },
    "DINOv3": lambda teacher, student: (
        under("student.dino_head.", student)
        | under("teacher.dino_head.", teacher)
        | under("model_ema.dino_head.", teacher)
        | under("gram_teacher.", BACKBONE)
    ),
    "lightly, nidl": lambda teacher, student: {
        "state_dict": under("student_head.", student)
        | under("teacher_head.", teacher)
        | {"criterion.center": torch.zeros(1, 1, 12)}
    },
    "lightly-train": lambda teacher, student: {
        "state_dict": under("student_head.dino_head.", student) | under("teacher_head.dino_head.", teacher)
    },
    "solo-learn": lambda teacher, student: {
        "state_dict": under("head.", student)
        | under("momentum_head.", teacher)
        | {"classifier.weight": torch.ones(2, 2)}
    },
    "this library": lambda teacher, student: {
        "state_dict": under("student.head.", student) | under("teacher.head.", teacher) | under("student.", BACKBONE),
        "callbacks": {"FreezeLastLayerCallback": {"steps": 3}},
    },
    "compiled and sharded": lambda teacher, student: {
        "state_dict": {
            f"model.{side}._orig_mod.head._fsdp_wrapped_module.{key}": value
            for side, state in (("student", student), ("teacher", teacher))
            for key, value in state.items()
        }
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_both_heads_are_found_in_every_projects_checkpoint(name, layout, tmp_path):
    teacher, student = head_like(1), head_like(2)
    checkpoint = CHECKPOINTS[name](export_head(teacher, layout), export_head(student, layout))
    torch.save(checkpoint, tmp_path / "file.pth")
    for part, head in (("teacher", teacher), ("student", student)):
        torch.testing.assert_close(outputs(load_head(tmp_path / "file.pth", part)), outputs(head))
    assert not torch.allclose(outputs(teacher), outputs(student))


@pytest.mark.parametrize("prefix", ["", "head.", "dino_head.", "module.head.", "projection.mlp.", "a.b.c."])
def test_a_head_without_a_side_matches_both_sides_if_it_is_the_only_one(prefix):
    head = head_like()
    for part in ("teacher", "student"):
        loaded = load_head(under(prefix, export_head(head, "dino")), part)
        assert bitwise_equal(loaded.state_dict(), head.state_dict())


def test_part_matches_the_path_or_a_part_of_it():
    heads = {f"{side}.{kind}": head_like(seed) for seed, (side, kind) in enumerate(
        itertools.product(("teacher", "student", "gram_teacher"), ("dino_head", "ibot_head"))
    )}  # fmt: skip
    checkpoint = {"model": {}}
    for path, head in heads.items():
        checkpoint["model"] |= under(f"{path}.", head.state_dict())
    for path, head in heads.items():
        for part in (path, f"model.{path}"):
            if path.startswith("teacher") or part.startswith("model"):
                assert bitwise_equal(load_head(checkpoint, part).state_dict(), head.state_dict())
    with pytest.raises(
        ValueError, match=r"2 heads match part='teacher': 'model.teacher.dino_head', 'model.teacher.ibot"
    ):
        load_head(checkpoint)
    with pytest.raises(ValueError, match=r"3 heads match part='dino_head'"):
        load_head(checkpoint, "dino_head")
    with pytest.raises(
        ValueError,
        match=r"no head matches part='target', found 'model.teacher.dino_head', .*: pass one of these as part",
    ):
        load_head(checkpoint, "target")


def test_the_head_of_the_other_side_does_not_match():
    for side, other in (("teacher", "student"), ("student", "teacher")):
        with pytest.raises(ValueError, match=f"no head matches part='{side}', found '{other}_head'"):
            load_head(under(f"{other}_head.", head_like().state_dict()), side)
    with pytest.raises(ValueError, match=r"no head matches part='teacher', found 'a', 'b'"):
        load_head(under("a.", head_like().state_dict()) | under("b.", head_like().state_dict()))


@pytest.mark.parametrize("prefix", ["Student.head.", "studentHead.", "student-head.", "student2."])
def test_a_side_matches_in_any_spelling(prefix):
    state = under(prefix, head_like().state_dict())
    with pytest.raises(ValueError, match=r"no head matches part='teacher'"):
        load_head(state)
    assert bitwise_equal(load_head(state, "student").state_dict(), head_like().state_dict())


def test_an_average_of_the_student_is_a_teacher():
    average, student = head_like(1), head_like(2)
    state = under("ema_student_head.", average.state_dict()) | under("head.", student.state_dict())
    assert bitwise_equal(load_head(state).state_dict(), average.state_dict())
    assert bitwise_equal(load_head(state, "student").state_dict(), student.state_dict())


def test_the_whole_path_matches_before_a_part_of_it():
    one, other = head_like(1), head_like(2)
    state = under("head.", one.state_dict()) | under("x.head.", other.state_dict())
    assert bitwise_equal(load_head(state, "head").state_dict(), one.state_dict())
    assert bitwise_equal(load_head(state, "x").state_dict(), other.state_dict())


def test_two_heads_whose_paths_differ_in_a_wrapper_raise():
    one, other = (export_head(head_like(seed), "dino") for seed in (1, 2))
    mixed = under("module.head.", one) | under("head.", other)
    halves = {key: value for key, value in mixed.items() if ("mlp" in key) == key.startswith("module.")}
    for state in (mixed, halves):
        with pytest.raises(
            ValueError, match=r"'head' appears twice, as head, module.head: pass a state dict with only one"
        ):
            load_head(state)


def test_a_head_inside_a_head_raises():
    state = under("head.", head_like().state_dict()) | under("head.layers.9.", head_like(2).state_dict())
    with pytest.raises(ValueError, match=r"unexpected keys head.layers.9.layers.0.weight"):
        load_head(state, "head")


# Conversions between layouts.

OPTIONS = [
    {"norm_last_layer": True},
    {"norm_last_layer": False, "batch_norm": False},
    {"norm_last_layer": False, "num_layers": 1},
    {"norm_last_layer": True, "num_layers": 2, "bias": False},
    {"norm_last_layer": None, "num_layers": 4, "bias": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("one", "other"), [*itertools.product(LAYOUTS, LAYOUTS)])
def test_round_trips_between_every_pair_of_layouts(one, other, options):
    head = head_like(**options)
    first = export_head(head, one)
    second = export_head(load_head(first), other)
    third = export_head(load_head(second), one)
    assert first.keys() == third.keys()
    if (one in WEIGHT_NORMED and other in WEIGHT_NORMED) or one == other:
        assert bitwise_equal(first, third)
    last_layer = load_head(third).last_layer
    assert ((last_layer.weight - head.last_layer.weight).norm() <= 1e-6 * head.last_layer.weight.norm()).all()
    torch.testing.assert_close(last_layer.weight, head.last_layer.weight, rtol=1e-6, atol=0)
    assert bitwise_equal(load_head(third).layers.state_dict(), head.layers.state_dict())


@pytest.mark.parametrize(
    ("layout", "num_layers", "keys"),
    [
        ("dino", 2, {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "last_layer.weight_g",
                     "last_layer.weight_v"}),
        ("dino", 1, {"mlp.weight", "mlp.bias", "last_layer.weight_g", "last_layer.weight_v"}),
        ("dinov3", 1, {"mlp.weight", "mlp.bias", "last_layer.weight"}),
        ("lightly", 1, {"layers.0.weight", "layers.0.bias", "last_layer.weight_g", "last_layer.weight_v"}),
        ("lightly-train", 1, {"mlp.weight", "mlp.bias", "last_layer.parametrizations.weight.original0",
                              "last_layer.parametrizations.weight.original1"}),
    ],
)  # fmt: skip
def test_the_keys_of_each_layout(layout, num_layers, keys):
    assert export_head(head_like(batch_norm=False, num_layers=num_layers), layout).keys() == keys


def test_weight_norm_of_torch_reads_what_is_exported():
    head = head_like(norm_last_layer=False)
    modern = nn.utils.parametrizations.weight_norm(nn.Linear(4, 12, bias=False))
    state = export_head(head, "lightly-train")
    prefix = "last_layer."
    modern.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    torch.testing.assert_close(modern.weight, head.last_layer.weight)


class WithMore(DINOProjectionHead):
    def __init__(self):
        super().__init__(6, 8, 4, 12)
        self.predictor = nn.Sequential(nn.Linear(4, 4))


def test_a_head_with_other_parameters_is_neither_exported_nor_filled():
    with pytest.raises(ValueError, match=r"no layout has keys for predictor.0.weight, predictor.0.bias of WithMore"):
        export_head(WithMore(), "dino")
    with pytest.raises(ValueError, match=r"predictor.0.weight is missing"):
        load_head(head_like().state_dict(), head=WithMore())


def test_export_of_values_that_are_not_finite_raises():
    head = head_like(norm_last_layer=None).half()
    head.last_layer.weight.data.fill_(60000)
    with pytest.raises(ValueError, match=r"12 of 12 values of last_layer.weight_g are not finite"):
        export_head(head, "dino")
    head.last_layer.weight.data.zero_()
    with pytest.raises(ValueError, match=r"12 prototypes have a norm of 0"):
        export_head(head, "dino")
    assert not export_head(head, "dinov3")["last_layer.weight"].any()
    with pytest.raises(ValueError, match=r"layers.0.weight is a tensor without memory .*: gather the head first"):
        export_head(head.to("meta"), "dino")


def test_an_export_is_a_copy():
    head = head_like()
    exported = export_head(head, "lightly")
    kept = copy.deepcopy(exported)
    head.last_layer.weight_v.data.zero_()
    assert bitwise_equal(exported, kept)
    assert not any(value.requires_grad for value in exported.values())


def test_results_are_contiguous():
    """safetensors refuses other tensors, and files converted from JAX hold some."""
    columns = {
        key: value.t().contiguous().t() if value.ndim == 2 else value for key, value in head_like().state_dict().items()
    }
    loaded = load_head(columns)
    assert all(value.is_contiguous() for value in loaded.state_dict().values())
    head = head_like(norm_last_layer=None)
    head.last_layer.weight.data = head.last_layer.weight.data.t().contiguous().t()
    assert all(value.is_contiguous() for layout in LAYOUTS for value in export_head(head, layout).values())


@pytest.mark.parametrize(("head", "layout", "message"), [
    (head_like(), "dino2", "layout must be one of 'dino', 'dinov3', 'lightly', 'lightly-train', got 'dino2'"),
    (nn.Sequential(head_like()), "dino", "expected a DINOProjectionHead, got a Sequential: pass the head inside"),
])  # fmt: skip
def test_export_of_a_wrong_head_or_layout_raises(head, layout, message):
    with pytest.raises(ValueError, match=message):
        export_head(head, layout)


# Arguments from keys and shapes.

WRAPPED = st.lists(
    st.sampled_from(
        ["module", "_orig_mod", "_fsdp_wrapped_module", "teacher", "head", "dino_head", "state_dict", "net", "mlp"]
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    widths=st.tuples(*[st.integers(1, 9)] * 4),
    num_layers=st.integers(1, 5),
    batch_norm=st.booleans(),
    bias=st.sampled_from([None, True, False]),
    norm=st.sampled_from([True, False, None]),
    layout=st.sampled_from(LAYOUTS),
    prefix=WRAPPED,
    inside=st.sampled_from(["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]),
    seed=st.integers(0, 99),
)
def test_a_head_of_any_shape_loads_from_any_layout_and_prefix(
    widths, num_layers, batch_norm, bias, norm, layout, prefix, inside, seed
):
    options = dict(zip(("input_dim", "hidden_dim", "bottleneck_dim", "output_dim"), widths, strict=True))
    head = head_like(seed, **options, num_layers=num_layers, batch_norm=batch_norm, bias=bias, norm_last_layer=norm)
    state = {key.replace(".", f".{inside}", 1): value for key, value in export_head(head, layout).items()}
    loaded = load_head(under("".join(f"{part}." for part in prefix), state))
    assert [*map(repr, loaded.layers)] == [*map(repr, head.layers)]
    assert loaded.state_dict()["layers.0.weight"].shape == (widths[1] if num_layers > 1 else widths[2], widths[0])
    torch.testing.assert_close(outputs(loaded), outputs(head), rtol=1e-5, atol=1e-6)
    if norm is not None and layout in WEIGHT_NORMED:
        assert bitwise_equal(loaded.state_dict(), head.state_dict())


@pytest.mark.parametrize(("norm", "passed", "expected"), [
    (True, None, False), (True, True, False), (True, False, True), (False, None, True), (False, False, True)
])  # fmt: skip
def test_whether_norms_are_trainable(norm, passed, expected):
    head = head_like(norm_last_layer=norm)
    loaded = load_head(head.state_dict(), norm_last_layer=passed)
    assert loaded.last_layer.weight_g.requires_grad is expected
    assert bitwise_equal(loaded.state_dict(), head.state_dict())
    assert all(p.requires_grad for name, p in loaded.named_parameters() if name != "last_layer.weight_g")


def test_fixed_norms_other_than_1_raise():
    for layout in ("dino", "dinov3"):
        with pytest.raises(ValueError, match=r"needs prototypes of norm 1, got norms from .* norm_last_layer=False"):
            load_head(export_head(head_like(norm_last_layer=False), layout), norm_last_layer=True)


PRECISIONS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def test_a_norm_that_is_nan_raises():
    state = head_like().state_dict()
    state["last_layer.weight_g"] = with_value(float("nan"))(state["last_layer.weight_g"])
    with pytest.raises(ValueError, match=r"1 of 12 values of last_layer.weight_g are not finite"):
        load_head(state, head=head_like())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_plain_last_layer_gets_weight_norm_with_norm_last_layer(norm, dtype):
    head = head_like(norm_last_layer=norm).to(dtype)
    plain = export_head(head, "dinov3")
    loaded = load_head(plain, norm_last_layer=norm)
    assert loaded.last_layer.weight_g.requires_grad is not norm
    assert not norm or (loaded.last_layer.weight_g == 1).all()
    weight = plain["last_layer.weight"].float()
    torch.testing.assert_close(loaded.last_layer.weight, weight, rtol=0, atol=PRECISIONS[dtype])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_fixed_norms_near_1_raise(dtype):
    plain = export_head(head_like(norm_last_layer=True), "dinov3")
    plain["last_layer.weight"] *= 1 + 3 * PRECISIONS[dtype]
    with pytest.raises(ValueError, match=r"needs prototypes of norm 1, got norms from 1"):
        load_head({key: value.to(dtype) for key, value in plain.items()}, norm_last_layer=True)


def test_a_teacher_with_fixed_norms_refuses_other_norms():
    """Its norms are fixed although nothing in it is trainable."""
    teacher = head_like(2).requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=r"needs prototypes of norm 1, got norms from .* norm_last_layer=False"):
        load_head(head_like(norm_last_layer=False).state_dict(), head=teacher)
    assert bitwise_equal(teacher.state_dict(), before)


@pytest.mark.parametrize("source", [False, None])
def test_a_teacher_with_trainable_norms_loads_any_norms(source):
    head = head_like(norm_last_layer=source)
    teacher = head_like(2, norm_last_layer=False).requires_grad_(False)
    load_head(head.state_dict(), head=teacher)
    torch.testing.assert_close(outputs(teacher), outputs(head))
    assert teacher.last_layer.weight_g.std() > 0.01


def test_a_direction_that_vanishes_in_the_given_head_raises():
    head = head_like(norm_last_layer=False)
    head.last_layer.weight_v.data.mul_(1e-8)
    torch.testing.assert_close(outputs(load_head(head.state_dict())), outputs(head))
    with pytest.raises(ValueError, match=r"12 prototypes have a norm of 0 in torch.float16"):
        load_head(head.state_dict(), head=head_like(norm_last_layer=False).half())


@pytest.mark.parametrize(("dtype", "expected"), [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64),
])  # fmt: skip
def test_a_new_head_keeps_the_precision(dtype, expected):
    state = head_like().to(dtype).state_dict()
    loaded = load_head(state).state_dict()
    for key, value in loaded.items():
        assert value.dtype == (torch.int64 if "num_" in key else expected)
        assert torch.equal(value.double(), state[key].double())


def test_a_head_has_one_precision():
    state = head_like().state_dict()
    state["last_layer.weight_g"] = state["last_layer.weight_g"].double()
    loaded = load_head(state)
    assert {value.dtype for value in loaded.parameters()} == {torch.float64}
    state["last_layer.weight_g"] = state["last_layer.weight_g"].to(torch.float8_e4m3fn)
    assert {value.dtype for value in load_head(state).parameters()} == {torch.float32}


def test_old_files_without_num_batches_tracked_load():
    state = {key: value for key, value in head_like().state_dict().items() if "num_batches" not in key}
    with torch.device("meta"):  # the caller's device does not matter
        loaded = load_head(state)
    assert loaded.layers[1].num_batches_tracked == 0
    torch.testing.assert_close(outputs(loaded), outputs(head_like()))


def test_loading_draws_no_random_number_and_copies():
    head = head_like()
    source, before = head.state_dict(), torch.get_rng_state()
    loaded = load_head(source)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.training
    kept = copy.deepcopy(loaded.state_dict())
    head.layers[0].weight.data.zero_()
    assert bitwise_equal(loaded.state_dict(), kept)
    outputs(loaded).sum().backward()  # an ordinary head


# Into an existing head.


def test_an_existing_head_is_filled_and_stays_itself():
    source, target = head_like(1, norm_last_layer=False), head_like(2, norm_last_layer=False)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    assert load_head(source.state_dict(), head=target) is target
    assert bitwise_equal(target.state_dict(), source.state_dict())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in target.parameters()}


def test_the_last_layer_takes_the_form_of_an_existing_head():
    plain, fixed, trained = (head_like(n or 0, norm_last_layer=n) for n in (None, True, False))
    for source, target in itertools.product((fixed, trained), (plain,)):
        load_head(source.state_dict(), head=target)
        torch.testing.assert_close(target.last_layer.weight, source.last_layer.weight, rtol=1e-6, atol=0)
    load_head(plain.state_dict(), head=trained)
    torch.testing.assert_close(trained.last_layer.weight, plain.last_layer.weight, rtol=1e-6, atol=0)
    half = head_like(norm_last_layer=None).half()
    load_head(trained.state_dict(), head=half)
    assert torch.equal(half.last_layer.weight, trained.last_layer.weight.half())  # rounded once


def broken(key, value):
    """A state dict in which one entry is changed or missing."""
    state = head_like(norm_last_layer=False).state_dict()
    if value is None:
        del state[key]
    else:
        state[key] = value(state[key]) if callable(value) else value
    return state


def with_value(number):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[1] = number
        return tensor

    return change


WRONG = {
    "layers.0.weight is missing": ("layers.0.weight", None),
    "layers.4.bias is missing": ("layers.4.bias", None),
    "layers.1.running_var is missing": ("layers.1.running_var", None),
    "last_layer.weight_g is missing": ("last_layer.weight_g", None),
    r"layers.3.weight has shape \(8, 7\), expected \(8, 8\)": ("layers.3.weight", torch.ones(8, 7)),
    r"weight_g has shape \(12,\), expected \(12, 1\)": ("last_layer.weight_g", torch.ones(12)),
    r"weight_v has shape \(12, 5\), expected \(12, 4\)": ("last_layer.weight_v", torch.ones(12, 5)),
    "unexpected keys last_layer.bias": ("last_layer.bias", torch.ones(12)),
    "unexpected keys last_layer2.weight_v": ("last_layer2.weight_v", torch.ones(12, 4)),
    "layers.2.weight is unexpected": ("layers.2.weight", torch.ones(8)),
    "unexpected keys mlp.0.weight": ("mlp.0.weight", torch.ones(8, 6)),
    "1 of 48 values of layers.0.weight are not finite": ("layers.0.weight", with_value(float("nan"))),
    "1 of 12 values of last_layer.weight_g are not finite": ("last_layer.weight_g", with_value(float("inf"))),
    "12 prototypes have a norm of 0": ("last_layer.weight_v", torch.zeros_like),
    "layers.0.weight has type torch.int8, expected a floating": ("layers.0.weight", torch.ones(8, 6, dtype=torch.int8)),
    "3 of 8 values of layers.1.running_var are negative or not": (
        "layers.1.running_var", torch.tensor([1.0, -1.0, 2.0, -0.1, 1.0, 0.0, 1.0, float("nan")])
    ),
    "layers.0.weight is a tensor of layout torch.sparse_coo": ("layers.0.weight", lambda value: value.to_sparse()),
    "unexpected keys layers.0.weight": ("layers.0.weight", lambda value: value.numpy()),
    "unexpected keys last_layer.bias.x": ("last_layer.bias", {"x": 3}),
    "layers.0.weight is a tensor without memory": ("layers.0.weight", torch.ones(8, 6, device="meta")),
    "layers.0.weight is a Strange, expected an ordinary tensor: gather": (
        "layers.0.weight", lambda value: value.as_subclass(type("Strange", (torch.Tensor,), {}))
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("exists", [True, False])
def test_an_incomplete_head_raises_and_changes_nothing(message, exists):
    head = head_like(4, norm_last_layer=False) if exists else None
    before = copy.deepcopy(head.state_dict()) if head else {}
    with pytest.raises(ValueError, match=f"no head was loaded from the state dict: .*{message}"):
        load_head(broken(*WRONG[message]), head=head)
    assert bitwise_equal(head.state_dict() if head else {}, before)


@pytest.mark.parametrize(("options", "message"), [
    ({"output_dim": 11}, r"\(output_dim=12, expected 11\): .*weight_v has shape \(12, 4\), expected \(11, 4\)"),
    ({"batch_norm": False}, "batch_norm=True, expected False.*layers.1.weight is unexpected"),
    ({"bias": True}, "layers.0.bias is missing"),
    ({"num_layers": 2}, "layers.6.weight is unexpected"),
])  # fmt: skip
def test_a_head_of_another_size_raises(options, message):
    with pytest.raises(ValueError, match=f"does not fit the given head.*{message}"):
        load_head(head_like().state_dict(), head=head_like(**options))


def test_a_value_that_overflows_in_the_given_head_raises():
    state = broken("layers.0.weight", with_value(1e6))
    head = head_like(norm_last_layer=False).half()
    with pytest.raises(ValueError, match=r"layers.0.weight are not finite in torch.float16: .* a higher precision"):
        load_head(state, head=head)


def test_loading_into_a_wrong_head_raises():
    state = head_like().state_dict()
    with torch.device("meta"):
        empty = DINOProjectionHead(6, 8, 4, 12)
    with pytest.raises(
        ValueError, match=r"layers.0.weight is a tensor without memory .* after its memory is allocated"
    ):
        load_head(state, head=empty)
    with pytest.raises(ValueError, match=r"expected a DINOProjectionHead, got a Linear"):
        load_head(state, head=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"norm_last_layer=True .* pass head or norm_last_layer, not both"):
        load_head(state, head=head_like(), norm_last_layer=True)
    with pytest.raises(ValueError, match=r"norm_last_layer must be True, False or None, got 'False'"):
        load_head(state, norm_last_layer="False")


@pytest.mark.parametrize(("source", "message"), [
    ({}, "no DINO head .*among no tensors"),
    ({"state_dict": {"head.mlp.0.weight": torch.ones(2, 2)}}, "no DINO head .*among state_dict.head.*"),
    ({"last_layer.weight": torch.ones(2, 2)}, "no DINO head"),
    ({"student.dino_head._flat_param": torch.ones(2)}, "flat shards of FSDP: save a full state dict"),
    ({"mlp.0.bias": torch.ones(2), "last_layer.weight": torch.ones(2, 2)}, "the MLP has no matrix"),
    ({"mlp.0.weight": torch.ones(2, 2), "last_layer.weight": torch.ones(2)}, "the last layer has no matrix"),
    (nn.Linear(2, 2), r"expected a path or a state dict, got Linear: for a module, pass module.state_dict\(\)"),
    ({"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(1)}}, "a.b.c appears twice"),
])  # fmt: skip
def test_sources_without_a_head_raise(source, message):
    with pytest.raises(ValueError, match=message):
        load_head(source)


# Reports.


def test_every_key_is_reported(caplog):
    state = under("teacher.module.head.", export_head(head_like(num_layers=2), "lightly-train"))
    del state["teacher.module.head.mlp.1.num_batches_tracked"]
    modern = "teacher.module.head.last_layer.parametrizations.weight"
    rest = {"teacher.module.backbone.a": torch.ones(1), "teacher.module.backbone.b": torch.ones(1), "epoch": 3, "x": {}}
    with caplog.at_level(logging.INFO, "dino_head.checkpoints"):
        load_head({**state, **rest, "student.head.mlp.0.weight": torch.ones(1)})
    assert caplog.text.split("\n", 1)[1].splitlines() == [
        "  norm_last_layer=True: each weight_g is 1",
        "  teacher.module.head.mlp.0.weight -> layers.0.weight (8, 6) torch.float32",
        "  teacher.module.head.mlp.1.weight -> layers.1.weight (8,) torch.float32",
        "  teacher.module.head.mlp.1.bias -> layers.1.bias (8,) torch.float32",
        "  teacher.module.head.mlp.1.running_mean -> layers.1.running_mean (8,) torch.float32",
        "  teacher.module.head.mlp.1.running_var -> layers.1.running_var (8,) torch.float32",
        "  teacher.module.head.mlp.3.weight -> layers.3.weight (4, 8) torch.float32",
        "  teacher.module.head.mlp.3.bias -> layers.3.bias (4,) torch.float32",
        f"  {modern}.original1 -> last_layer.weight_v (12, 4) torch.float32",
        f"  {modern}.original0 -> last_layer.weight_g (12, 1) torch.float32",
        "  missing: layers.1.num_batches_tracked, set to 0",
        "not used: teacher.backbone.* (2 tensors), student.*",
        "other entries: epoch",
    ]
    assert (
        "teacher.head: DINOProjectionHead(input_dim=6, hidden_dim=8, bottleneck_dim=4, output_dim=12, " in caplog.text
    )


@pytest.mark.parametrize(("source", "options", "line"), [
    (True, {}, "norm_last_layer=True: each weight_g is 1"),
    (False, {}, "norm_last_layer=False: a weight_g is not 1"),
    (None, {}, "norm_last_layer=None: there is no weight norm"),
    (True, {"norm_last_layer": False}, "norm_last_layer=False: as passed"),
    (None, {"norm_last_layer": False}, "last_layer.weight -> last_layer.weight_g and last_layer.weight_v (12, 4)"),
    (False, {"head": head_like(norm_last_layer=None)}, "  into the given head"),
    (False, {"head": head_like(norm_last_layer=None)}, "last_layer.weight_g -> last_layer.weight (12, 1)"),
    (None, {"head": head_like(norm_last_layer=None).double()}, "(8, 6) torch.float32, now torch.float64"),
])  # fmt: skip
def test_the_choice_of_norm_last_layer_and_conversions_are_reported(source, options, line, caplog):
    with caplog.at_level(logging.INFO, "dino_head.checkpoints"):
        load_head(head_like(norm_last_layer=source).state_dict(), **options)
    assert line in caplog.text
