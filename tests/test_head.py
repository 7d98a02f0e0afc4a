import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dino_head import DINOProjectionHead, FactoredLogits, ProjectionHead
from dino_head.checkpoints import load_head

REFERENCE = Path(__file__).parent / "reference"
FILES = sorted(file.stem for file in REFERENCE.glob("head_*.npz"))


def rename(key: str) -> str:
    """The authors' keys as ours: their MLP is a Sequential called mlp, or with one layer a Linear."""
    return key.replace("mlp.weight", "layers.0.weight").replace("mlp.bias", "layers.0.bias").replace("mlp.", "layers.")


def test_there_are_references():
    assert len(FILES) == 13


@pytest.mark.parametrize("name", FILES)
def test_equals_the_reference(name):
    theirs = {key: torch.from_numpy(value) for key, value in np.load(REFERENCE / f"{name}.npz").items()}
    state = {key.removeprefix("state/"): value for key, value in theirs.items() if key.startswith("state/")}
    # DINOv2's norms are trainable; here they are 1, as nothing is trained yet.
    head = load_head(state, norm_last_layer=False if "dinov2" in name else None)
    assert head.state_dict().keys() == {rename(key) for key in state}
    figures = {rename(key): value for key, value in theirs.items()}
    x = figures["x"].requires_grad_()
    y = head(x)
    torch.testing.assert_close(y, figures["y"], rtol=1e-5, atol=1e-6)
    y.backward(figures["grad_y"])
    torch.testing.assert_close(x.grad, figures["grad_x"], rtol=1e-5, atol=1e-6)
    gradients = {key.removeprefix("grad/"): value for key, value in figures.items() if key.startswith("grad/")}
    ours = {key: parameter.grad for key, parameter in head.named_parameters() if parameter.grad is not None}
    assert ours.keys() == gradients.keys()
    # The gradient of a bias before batch norm is 0 but for rounding, so the absolute tolerance is the whole head's.
    atol = 1e-6 * max(gradient.abs().max().item() for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            ours[key], gradient, rtol=1e-5, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )
    for key, value in figures.items():
        if key.startswith("after/"):
            torch.testing.assert_close(head.state_dict()[key.removeprefix("after/")], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_last_layer", [True, False, None])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_factored_logits_multiply_to_what_forward_gives(norm_last_layer, batch_norm):
    head = DINOProjectionHead(8, 8, 4, 16, batch_norm, norm_last_layer=norm_last_layer)
    x = torch.randn(3, 5, 8)
    z, prototypes = head.factored_logits(x)
    assert (z.shape, prototypes.shape) == ((3, 5, 4), (16, 4))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(3, 5))
    torch.testing.assert_close(prototypes, head.last_layer.weight)
    assert torch.equal(head.factored_logits(x).logits(), head(x))


def test_factored_logits_call_the_module_so_that_its_hooks_run():
    head, seen = DINOProjectionHead(8, 8, 4, 16), []
    head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    head.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    x = torch.randn(3, 8)
    factored = head.eval().factored_logits(x)
    torch.testing.assert_close(factored.logits(), head(x))
    assert seen == [FactoredLogits, torch.Tensor]
    without_hooks = head.forward(x)
    assert not torch.allclose(factored.logits(), without_hooks)


def test_head_compile_compiles_factored_logits():
    head, calls = DINOProjectionHead(8, 8, 4, 16, batch_norm=False), []
    x = torch.randn(3, 8)
    expected = torch.autograd.grad(head.factored_logits(x).logits().square().sum(), list(head.layers.parameters()))

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    head.compile(backend=backend, fullgraph=True)
    found = torch.autograd.grad(head.factored_logits(x).logits().square().sum(), list(head.layers.parameters()))
    assert len(calls) == 1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3), (1, 6, 1, 1)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_leading_dimensions_are_samples_also_for_batch_norm(shape, batch_norm):
    torch.manual_seed(0)
    head = DINOProjectionHead(8, 8, 4, 16, batch_norm)
    other = copy.deepcopy(head)
    x = torch.randn(6, 8)
    y = head(x.reshape(*shape, 8))
    assert y.shape == (*shape, 16)
    torch.testing.assert_close(y.reshape(6, 16), other(x))
    for ours, theirs in zip(head.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_sample_without_leading_dimension():
    assert DINOProjectionHead(8, 8, 4, 16, batch_norm=False)(torch.randn(8)).shape == (16,)
    assert DINOProjectionHead(8, 8, 4, 16).eval()(torch.randn(8)).shape == (16,)


@pytest.mark.parametrize(
    ("batch_norm", "num_layers", "bias", "expected"),
    [
        (True, 3, None, [False, False, True]),
        (False, 3, None, [True, True, True]),
        (True, 3, True, [True, True, True]),
        (False, 2, False, [False, False]),
        (True, 1, None, [True]),
    ],
)
def test_bias_of_the_mlp(batch_norm, num_layers, bias, expected):
    head = DINOProjectionHead(8, 8, 4, 16, batch_norm, num_layers=num_layers, bias=bias)
    assert [layer.bias is not None for layer in head.layers if isinstance(layer, nn.Linear)] == expected


def test_initialisation():
    torch.manual_seed(0)
    head = DINOProjectionHead(256, 256, 64, 4096)
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert layer.bias is None or not layer.bias.any()
    torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.ones(4096))
    assert head.last_layer.weight_v.abs().max() <= 64**-0.5  # nn.Linear's uniform bound
    assert head.last_layer.weight_v.std().item() == pytest.approx((64 * 3) ** -0.5, rel=0.01)
    plain = DINOProjectionHead(256, 256, 64, 4096, norm_last_layer=None)
    assert plain.last_layer.weight.std().item() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize(("norm_last_layer", "trainable"), [(True, False), (False, True)])
def test_norm_last_layer_decides_whether_the_scale_is_trained(norm_last_layer, trainable):
    layer = DINOProjectionHead(8, 8, 4, 16, norm_last_layer=norm_last_layer).last_layer
    assert isinstance(layer.weight_g, nn.Parameter) is layer.weight_g.requires_grad is trainable
    assert torch.equal(layer.weight_g, torch.ones(16, 1))


@pytest.mark.parametrize("prefix", ["", "student.head."])
@pytest.mark.parametrize(("options", "message"), [
    ({"output_dim": 32}, "a head with output_dim=32, but this one has output_dim=16: set these options of"),
    ({"input_dim": 9}, "a head with input_dim=9, but this one has input_dim=8: set"),
    ({"batch_norm": False}, "batch_norm=False, bias=True, but this one has batch_norm=True, bias=None"),
])  # fmt: skip
def test_a_state_of_other_sizes_names_the_options_to_set(options, message, prefix):
    sizes = {"input_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4, "output_dim": 16}
    head, other = DINOProjectionHead(**sizes), DINOProjectionHead(**{**sizes, **options})
    module = nn.ModuleDict({"student": nn.ModuleDict({"head": head})}) if prefix else head
    with pytest.raises(RuntimeError, match=f"(?s)state dict is from .*{message}"):
        module.load_state_dict(other.state_dict(prefix=prefix))


@pytest.mark.parametrize(("own", "loaded", "message"), [
    (True, None, r'"last_layer.weight: from a plain last layer, set norm_last_layer=None, or convert .*load_head'),
    (None, False, r'"last_layer.weight_v: from weight norm, set norm_last_layer=True or False, or convert'),
])  # fmt: skip
def test_a_state_with_another_last_layer_names_the_option_to_set(own, loaded, message):
    head, other = (DINOProjectionHead(8, 8, 4, 16, norm_last_layer=norm) for norm in (own, loaded))
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict(other.state_dict())
    keys = {name for name in other.state_dict() if name.startswith("last_layer")}
    assert {*head.load_state_dict(other.state_dict(), strict=False).unexpected_keys} == keys


def test_an_empty_state_is_refused_by_pytorch():
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layers.0.weight"'):
        DINOProjectionHead(8, 8, 4, 16).load_state_dict({})


def test_the_keys_are_those_of_the_lightning_libraries():
    keys = set(DINOProjectionHead(8, 8, 4, 16).state_dict())
    assert {"layers.0.weight", "layers.1.running_mean", "layers.6.bias"} <= keys
    assert {"last_layer.weight_g", "last_layer.weight_v"} <= keys
    assert set(DINOProjectionHead(8, 8, 4, 16, num_layers=1, norm_last_layer=None).state_dict()) == {
        "layers.0.weight",
        "layers.0.bias",
        "last_layer.weight",
    }


# Where the head has to work. Each case trains a step, so that used modules are meant.


def used_head(**options) -> tuple[DINOProjectionHead, torch.Tensor]:
    torch.manual_seed(0)
    head = DINOProjectionHead(8, 8, 4, 16, **options)
    x = torch.randn(6, 8)
    head(x).sum().backward()
    return head, x


@pytest.mark.parametrize("norm_last_layer", [True, False, None])
def test_copies_and_pickles_of_a_used_head_are_equal(norm_last_layer):
    head, x = used_head(norm_last_layer=norm_last_layer)
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    loaded = DINOProjectionHead(8, 8, 4, 16, norm_last_layer=norm_last_layer)
    loaded.load_state_dict(head.state_dict())
    copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(file, weights_only=False), loaded]
    for other in copies:
        assert torch.equal(other.eval()(x), head.eval()(x))
        assert other.last_layer is not head.last_layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_last_layer", [True, False, None])
def test_autocast_stays_near_float32(dtype, norm_last_layer):
    head, x = used_head(norm_last_layer=norm_last_layer)
    exact = head(x)
    with torch.autocast("cpu", dtype):
        y = head(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_parameter_types(dtype):
    head, x = used_head(batch_norm=False)
    y = copy.deepcopy(head).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), head(x), rtol=0, atol=0.05)


def test_gradients_in_float64():
    head, x = used_head(norm_last_layer=False)
    head.double()
    assert torch.autograd.gradcheck(head, (x.double().requires_grad_(),))


def test_a_zero_vector_stays_finite_in_float16():
    head = DINOProjectionHead(8, 8, 4, 16, batch_norm=False, bias=False).half()
    assert torch.equal(head(torch.zeros(2, 8, dtype=torch.float16)), torch.zeros(2, 16, dtype=torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("norm_last_layer", [True, None])
def test_compile_without_graph_break(norm_last_layer):
    head, x = used_head(norm_last_layer=norm_last_layer)
    other = copy.deepcopy(head)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.reshape(2, 3, 8)), other(x.reshape(2, 3, 8)))


def test_export():
    head, x = used_head()
    head.eval()
    exported = torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    y = torch.randn(9, 8)
    torch.testing.assert_close(exported.module()(y), head(y))


def test_meta_device_then_initialised():
    with torch.device("meta"):
        head = DINOProjectionHead(8, 8, 4, 16, norm_last_layer=False)
    assert head(torch.empty(6, 8, device="meta")).shape == (6, 16)
    head.to_empty(device="cpu")
    head.reset_parameters()
    assert head.last_layer.weight_g.requires_grad
    assert head(torch.randn(6, 8)).isfinite().all()
    torch.testing.assert_close(head.last_layer.weight.norm(dim=1), torch.ones(16))


def test_sync_batch_norm():
    head, x = used_head()
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(head))
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in other.layers)
    torch.testing.assert_close(other(x.reshape(2, 3, 8)), head(x.reshape(2, 3, 8)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        other(x[:1])


# Gradients cancelled.


@pytest.mark.parametrize(("freeze", "epoch", "cancelled"), [(2, 0, True), (2, 1, True), (2, 2, False), (0, 0, False)])
@pytest.mark.parametrize("norm_last_layer", [True, False, None])
def test_cancel_last_layer_gradients(freeze, epoch, cancelled, norm_last_layer):
    head, _ = used_head(freeze_last_layer=freeze, norm_last_layer=norm_last_layer)
    head.cancel_last_layer_gradients(epoch)
    for name, parameter in head.named_parameters():
        expected = name.startswith("last_layer") and (cancelled or not parameter.requires_grad)
        assert (parameter.grad is None) == expected, name


def test_freeze_is_off_by_default():
    head, _ = used_head()
    head.cancel_last_layer_gradients(0)
    assert head.freeze_last_layer == -1
    assert head.last_layer.weight_v.grad is not None


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 0}, "input_dim must be an integer >= 1, got 0"),
        ({"hidden_dim": 2.5}, "hidden_dim must be an integer >= 1, got 2.5"),
        ({"bottleneck_dim": "64"}, "bottleneck_dim must be an integer >= 1, got '64'"),
        ({"output_dim": True}, "output_dim must be an integer >= 1, got True"),
        ({"num_layers": 0}, "num_layers must be an integer >= 1, got 0"),
        ({"freeze_last_layer": -2}, r"freeze_last_layer must be an integer >= -1 \(epochs; .*\), got -2"),
        ({"freeze_last_layer": 1.0}, "freeze_last_layer must be an integer"),
        ({"norm_last_layer": "False"}, "norm_last_layer must be True, False or None, got 'False'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DINOProjectionHead(**options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(4, 7), r"width 8 \(input_dim\), got shape \(4, 7\): set input_dim=7"),
        (torch.randn(4, 5, 7), r"got shape \(4, 5, 7\): set input_dim=7"),
        (torch.randn(4, 8, 7, 7), r"8 channels in dimension -3, pass their mean, x.flatten\(-2\).mean\(dim=-1\)"),
        (torch.randn(2, 4, 8, 7, 7), r"8 channels in dimension -3, pass their mean, x.flatten\(-2\).mean\(dim=-1\)"),
        (torch.randn(4, 8, 5, 7, 7), r"8 channels in dimension -4, pass their mean, x.flatten\(-3\).mean\(dim=-1\)"),
        (torch.randn(4, 8, 5), r"8 channels in dimension -2, pass their mean, x.flatten\(-1\).mean\(dim=-1\)"),
        (
            torch.randn(4, 6, 7, 7),
            r"maps.flatten\(2\).mean\(dim=2\), and set input_dim=6; if .* tokens, set input_dim=7",
        ),
        (
            (torch.randn(4, 8), None),
            r"tensor of features \(..., 8\), got a tuple of \[\(4, 8\), 'NoneType'\]: wrap the",
        ),
        ([torch.randn(4, 8)] * 2, r"got a list of \[\(4, 8\), \(4, 8\)\]: .* torch.stack\(features\)"),
        ({"x": torch.randn(4, 8)}, "got a dict with the keys 'x': wrap the backbone in dino_head.vision.Features"),
        (torch.tensor(1.0), r"width 8 \(input_dim\), got shape \(\)"),
        (torch.ones(4, 8, dtype=torch.long), r"floating-point features, got torch.int64: convert"),
        (torch.randn(1, 8), r"at least 2 samples, got shape \(1, 8\)"),
        (torch.randn(8), r"at least 2 samples, got shape \(8,\)"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    with pytest.raises(ValueError, match=message):
        DINOProjectionHead(8, 8, 4, 16)(x)


def test_the_means_that_the_errors_advise_are_features():
    maps = torch.randn(4, 8, 7, 7)
    head = DINOProjectionHead(8, 8, 4, 16).eval()
    torch.testing.assert_close(head(maps.flatten(-2).mean(dim=-1)), head(maps.mean(dim=(2, 3))))
    torch.testing.assert_close(maps.flatten(2).mean(dim=2), maps.mean(dim=(2, 3)))


@pytest.mark.parametrize("arguments", [(64, 65536), (64, 16384, 256, 4096)])
def test_the_authors_order_of_arguments_is_refused_before_memory_is_allocated(arguments, monkeypatch):
    monkeypatch.setattr(nn, "Linear", lambda *args, **options: pytest.fail("allocated"))
    options = rf"DINOProjectionHead\(64, output_dim={arguments[1]}\), as the positional order is input_dim, hidden_dim"
    with pytest.raises(ValueError, match=options):
        DINOProjectionHead(*arguments)


@pytest.mark.parametrize("arguments", [(64, 16383), (64, 16384, 256, 16384), (64, 2048, 256, 65536)])
def test_wide_heads_are_allowed(arguments):
    with torch.device("meta"):
        assert DINOProjectionHead(*arguments).last_layer.weight.shape[0] == (arguments[3:] or (4096,))[0]


def test_projection_head_is_its_blocks():
    head = ProjectionHead([(8, 6, nn.BatchNorm1d(6), nn.ReLU()), (6, 5, nn.LayerNorm(5), None), (5, 3, None, None)])
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.LayerNorm, nn.Linear]
    assert [type(layer) for layer in head.layers] == kinds
    assert [layer.bias is not None for layer in head.layers if isinstance(layer, nn.Linear)] == [False, True, True]
    assert head(torch.randn(4, 2, 8)).shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "at least one"),
        ([(8, 6, None, None), (5, 3, None, None)], "block 1 expects inputs of width 5, got 6 from block 0"),
        ([(8, 0, None, None)], "the output width of block 0 must be an integer >= 1, got 0"),
    ],
)
def test_blocks_that_do_not_fit(blocks, message):
    with pytest.raises(ValueError, match=message):
        ProjectionHead(blocks)
