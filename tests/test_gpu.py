"""Head, objective, metrics and callbacks on a GPU, in three precisions, against float64 on the CPU.

The tests marked `gpu` need no packages but torch, lightning, torchmetrics and pytest; `benchmarks/gpu.py` runs them.
The same tests run on the CPU. There, those about waiting for the device fail if the host reads a value of a tensor.
"""

import copy
import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from helpers.operations import without_reads
from helpers.outputs import factors, low_precision_loop
from helpers.tiny_dino import tiny_dino, view_loader
from helpers.toy_training import trainer
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

from dino_head import (
    DINOLoss,
    DINOProjectionHead,
    FactoredLogits,
    IBOTPatchLoss,
    dino_loss,
    ibot_patch_loss,
    koleo_loss,
    random_block_masks,
)
from dino_head.callbacks import FreezeLastLayerCallback, ScheduleCallback, TeacherUpdateCallback
from dino_head.functional import sinkhorn_center
from dino_head.functional.dino import reference_dino_loss
from dino_head.functional.ibot import patch_weights
from dino_head.metrics import DINOStatistics, KNNAccuracy, RankMe

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_devices = pytest.mark.parametrize("device", DEVICES)
in_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def autocast(device, dtype):
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def on(device, out, dtype=None):
    """A copy without its graph; it requires a gradient if the original does."""
    if isinstance(out, FactoredLogits):
        return FactoredLogits(*(on(device, tensor, dtype) for tensor in out))
    return out.detach().to(device, dtype, copy=True).requires_grad_(out.requires_grad)


def doubles(module):
    return {name: value.detach().cpu().double() for name, value in module.named_parameters()}


def assert_as_exact(ours, plain, truth, dtype, factor=1.3):
    """Relative errors to float64 of no more than those of the plain formula in the same precision."""
    rounding = 32 * torch.finfo(torch.float32).eps + 0.05 * torch.finfo(dtype).eps * (dtype != torch.float32)
    for found, of_plain, expected in zip(ours, plain, truth, strict=True):
        errors = [((side.double().cpu() - expected).norm() / expected.norm()).item() for side in (found, of_plain)]
        assert errors[0] <= factor * errors[1] + rounding, errors


# Head and objective.


def plain_head(parameters, x):
    """The definition: linear layers and GELU, a unit vector, and its product with the prototypes."""
    for index in (0, 2, 4):
        x = F.linear(x, parameters[f"layers.{index}.weight"], parameters[f"layers.{index}.bias"])
        x = F.gelu(x) if index < 4 else x / x.norm(dim=-1, keepdim=True)
    if "last_layer.weight" in parameters:
        return F.linear(x, parameters["last_layer.weight"])
    directions = parameters["last_layer.weight_v"]
    norms = parameters.get("last_layer.weight_g", 1.0)
    return F.linear(x, norms * directions / directions.norm(dim=-1, keepdim=True))


@on_devices
@in_precisions
@pytest.mark.parametrize("norm_last_layer", [True, False, None])
def test_the_head_is_as_exact_as_the_plain_formula(norm_last_layer, dtype, device):
    torch.manual_seed(0)
    head = DINOProjectionHead(64, 128, 32, 300, batch_norm=False, norm_last_layer=norm_last_layer)
    with torch.no_grad():
        for layer in head.layers.parameters():
            layer.copy_(0.1 * torch.randn_like(layer))
        if norm_last_layer is False:
            head.last_layer.weight_g.uniform_(0.5, 1.5)
    x, weights = torch.randn(3, 50, 64), torch.randn(3, 50, 300)

    def logits_and_gradients(call, parameters, x, weights):
        out = call(x)
        return [out, *torch.autograd.grad((out * weights).sum(), list(parameters.values()))]

    exact = {name: value.requires_grad_() for name, value in doubles(head).items()}
    truth = logits_and_gradients(lambda x: plain_head(exact, x), exact, x.double(), weights.double())
    head.to(device)
    parameters = dict(head.named_parameters())
    results = {}
    for name, call in (("ours", head), ("plain", lambda x: plain_head(parameters, x))):
        with autocast(device, dtype):
            results[name] = logits_and_gradients(call, parameters, x.to(device), weights.to(device))
    assert_as_exact(results["ours"], results["plain"], truth, dtype)
    assert results["ours"][0].dtype == dtype


@on_devices
@in_precisions
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("outputs", [500, 3000])  # a GPU has another softmax for more than 1024
def test_the_loss_is_as_exact_as_the_plain_formula(outputs, factored, dtype, device):
    truth_t, truth_s, truth_center = factors(samples=128, outputs=outputs, dtype=torch.float64)
    truth = reference_dino_loss(truth_t.logits(), truth_s.logits(), center=truth_center.flatten())
    gradients = torch.autograd.grad(truth, truth_s)
    teacher, student, center = (on(device, out) for out in factors(samples=128, outputs=outputs))
    results = {}
    for name in ("ours", "plain"):
        with autocast(device, dtype):
            if name == "plain":
                loss = low_precision_loop(teacher.logits(), student.logits(), center)
            else:
                out = (teacher, student) if factored else (teacher.logits(), student.logits())
                loss = dino_loss(*out, center=center, block_bytes=30_000)
        scale = 2.0**12  # as a GradScaler's
        found = torch.autograd.grad(loss * scale, student)
        results[name] = [loss.detach(), *(gradient / scale for gradient in found)]
    assert results["ours"][0].dtype == torch.float32
    assert_as_exact(results["ours"], results["plain"], [truth.detach(), *gradients], dtype)
    error = (results["ours"][1].double().cpu() - gradients[0]).norm() / gradients[0].norm()
    assert (error > 1e-5) == (dtype != torch.float32)  # the precision is on


@on_devices
@in_precisions
@pytest.mark.parametrize("factored", [True, False])
def test_the_loss_of_masked_patches_is_as_exact_as_the_plain_formula(factored, dtype, device):
    masks = torch.rand(8, 40, generator=torch.Generator().manual_seed(0)) < 0.4  # on the CPU
    weights = patch_weights(masks, int(masks.sum()))
    sides = {}
    for kind in (torch.float64, torch.float32):
        *both, center = factors(1, 1, len(weights), outputs=3000, dtype=kind)
        sides[kind] = [FactoredLogits(side.z.detach()[0], side.prototypes.detach()) for side in both], center.flatten()
    (teacher, student), center = sides[torch.float64]
    student = FactoredLogits(*(tensor.requires_grad_() for tensor in student))

    def plain(teacher, student, center, weights):
        dtype = torch.promote_types(student.dtype, torch.float32)
        p = ((teacher.to(dtype) - center) / 0.07).softmax(dim=-1)
        return -(weights * (p * (student.to(dtype) / 0.1).log_softmax(dim=-1)).sum(dim=-1)).sum()

    truth = plain(teacher.logits(), student.logits(), center, weights.double())
    gradients = torch.autograd.grad(truth, student)
    (teacher, student), center = sides[torch.float32]
    teacher, student, center, weights = (on(device, out) for out in (teacher, student, center, weights))
    student = FactoredLogits(*(tensor.requires_grad_() for tensor in student))
    results = {}
    for name in ("ours", "plain"):
        with autocast(device, dtype):
            if name == "plain":
                loss = plain(teacher.logits(), student.logits(), center, weights)
            else:
                out = (teacher, student) if factored else (teacher.logits(), student.logits())
                loss = ibot_patch_loss(*out, weights, center=center, block_bytes=300_000)
        found = torch.autograd.grad(loss * 2.0**12, student)
        results[name] = [loss.detach(), *(gradient / 2.0**12 for gradient in found)]
    assert_as_exact(results["ours"], results["plain"], [truth.detach(), *gradients], dtype)


@on_devices
@in_precisions
def test_koleo_is_computed_in_float32(dtype, device):
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    unit = F.normalize(x.double(), dim=-1)
    distances = torch.cdist(unit, unit) + 10 * torch.eye(12)
    expected = -distances.amin(dim=1).log().mean()
    x = x.to(device).requires_grad_()
    with autocast(device, dtype):
        loss = koleo_loss(x)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def plain_sinkhorn(logits, temp):
    """The potentials of three iterations as a center, from the definition."""
    rows = logits.flatten(end_dim=1).to(torch.promote_types(logits.dtype, torch.float32)) / temp
    of_samples = torch.zeros_like(rows[:, :1])
    for _ in range(3):
        of_prototypes = (rows - of_samples).exp().sum(dim=0).log()
        of_samples = (rows - of_prototypes).exp().sum(dim=1, keepdim=True).log()
    return temp * of_prototypes


@on_devices
@in_precisions
@pytest.mark.parametrize("factored", [True, False])
def test_sinkhorn_is_as_exact_as_the_plain_formula(factored, dtype, device):
    truth = plain_sinkhorn(factors(samples=32, outputs=100, dtype=torch.float64)[0].logits(), 0.1)
    teacher = on(device, factors(samples=32, outputs=100)[0])
    with autocast(device, dtype):
        ours = sinkhorn_center(teacher if factored else teacher.logits(), 0.1, block_bytes=30_000)
        plain = plain_sinkhorn(teacher.logits(), 0.1)
    assert ours.dtype == torch.float32
    assert_as_exact([ours], [plain], [truth], dtype)


@on_devices
@in_precisions
@pytest.mark.parametrize("factored", [True, False])
def test_a_deferred_center_is_the_mean_of_all_logits_of_a_step(factored, dtype, device):
    loss, expected = DINOLoss(200, center_momentum=0.8).to(device), torch.zeros(200, dtype=torch.float64)
    loss.defer_center_update = True
    for samples in ((3, 9), (5,)):  # of the calls of two steps
        rows = []
        for count in samples:
            teacher, student, _ = factors(samples=count)
            sides = [on(device, side, dtype) for side in (teacher, student)]
            sides = sides if factored else [side.logits() for side in sides]
            with autocast(device, dtype):
                loss(*sides)
            exact = on("cpu", sides[0], torch.float64)
            rows.append((exact.logits() if factored else exact).flatten(end_dim=1))
        torch.testing.assert_close(loss.center.flatten().cpu().double(), expected, rtol=1e-5, atol=1e-7)  # still
        loss.apply_center_update()
        expected = 0.8 * expected + 0.2 * torch.cat(rows).mean(dim=0)
        torch.testing.assert_close(loss.center.flatten().cpu().double(), expected, rtol=1e-5, atol=1e-7)


# Metrics.


@on_devices
@in_precisions
@pytest.mark.parametrize("factored", [True, False])
def test_statistics_equal_their_definition(factored, dtype, device):
    teacher, student, center = factors(samples=9, outputs=100)
    sides = [on(device, side, dtype) for side in (teacher, student)]
    sides = sides if factored else [side.logits().detach() for side in sides]
    metric = DINOStatistics(100).to(device)
    with autocast(device, dtype):
        metric.update(*sides, center=center.to(device))
    exact = [on("cpu", side, torch.float64) for side in sides]
    exact = [side.logits().detach() if factored else side for side in exact]
    p, q = ((exact[0] - center.double()) / 0.07).softmax(dim=-1), (exact[1] / 0.1).softmax(dim=-1)
    pairs = [(t, s) for t in range(len(p)) for s in range(len(q)) if t != s]
    expected = {
        "loss": torch.stack([-(p[t] * q[s].log()).sum(dim=-1).mean() for t, s in pairs]).mean(),
        "teacher_entropy": -(p * p.log()).sum(dim=-1).mean(),
        "student_entropy": -(q * q.log()).sum(dim=-1).mean(),
        "prototypes_used": p.argmax(dim=-1).unique().numel() / 100,
        "prototype_perplexity": math.exp(-(mean := p.mean(dim=(0, 1))) @ mean.log()),
    }
    found = metric.compute()
    assert {name: found[name].item() for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=2e-5
    )


def clusters(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    return F.one_hot(labels, 6) + 0.7 * torch.randn(samples, 6, generator=generator), labels


@on_devices
@in_precisions
def test_knn_accuracy_and_rank_equal_their_definitions(dtype, device):
    (voters, of_voters), (samples, labels) = clusters(90, seed=0), clusters(70, seed=1)
    voters, samples = voters.to(dtype), samples.to(dtype)
    knn, rank = KNNAccuracy(voters.to(device), of_voters.to(device), k=5).to(device), RankMe(6).to(device)
    with autocast(device, dtype):
        knn.update(samples.to(device), labels.to(device))
        rank.update(samples.to(device))
    similarity = F.normalize(samples.double(), dim=-1) @ F.normalize(voters.double(), dim=-1).T
    nearest = similarity.topk(5)
    votes = F.one_hot(of_voters[nearest.indices], 3) * (nearest.values / 0.07).exp()[..., None]
    expected = (votes.sum(dim=1).argmax(dim=-1) == labels).double().mean()
    assert 0.4 < expected < 0.95
    assert knn.compute().item() == pytest.approx(expected.item())
    sigma = torch.linalg.svdvals(samples.double())
    p = sigma / sigma.sum() + 1e-7
    assert rank.compute().item() == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-5)


# Callbacks.


def adamw(parameters, fused=True):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.04, fused=fused)


def training(fused=True):
    """A module whose gradients are large enough for float16."""
    torch.manual_seed(0)
    module = tiny_dino(lambda parameters: adamw(parameters, fused), clip_per_parameter=0.3)
    with torch.no_grad():
        for side in (module.student, module.teacher):
            for parameter in side["head"].layers.parameters():
                parameter.mul_(20)
    return module


def fit(module, device, dtype, *callbacks, scaler=None, **options):
    if dtype == torch.float16:  # a GradScaler, which Lightning would not use on the CPU
        scaler = torch.amp.GradScaler(device, **(scaler or {"init_scale": 2.0**8}))
        options["plugins"] = [MixedPrecision("16-mixed", device, scaler=scaler)]
    elif dtype == torch.bfloat16:
        options["precision"] = "bf16-mixed"
    run = trainer(*callbacks, accelerator="gpu" if device == "cuda" else "cpu", **options)
    run.fit(module, view_loader())
    return run


class ByHand(Callback):
    """Computes teacher and center in float64, from the student's weights and the teacher's outputs, and compares."""

    def on_train_start(self, trainer, pl_module):
        self.steps, self.total, self.logits = 0, trainer.estimated_stepping_batches, []
        self.student, self.teacher = doubles(pl_module.student), doubles(pl_module.teacher)
        self.center = pl_module.loss.center.cpu().double()
        self.frozen, self.types, self.trained_in = self.last_layer(pl_module), set(), set()
        pl_module.loss.register_forward_pre_hook(self.note)

    @staticmethod
    def last_layer(pl_module):
        return pl_module.student["head"].last_layer.weight_v.detach().clone()

    def note(self, loss, arguments):
        self.logits.append(on("cpu", arguments[0], torch.float64).logits().flatten(end_dim=1))
        self.types.add(loss.center.device.type)

    def on_train_batch_end(self, trainer, pl_module, *_):
        before, self.student = self.student, doubles(pl_module.student)
        if any(not torch.equal(value, before[name]) for name, value in self.student.items()):
            momentum = 1 - 0.3 * (1 + math.cos(math.pi * self.steps / self.total)) / 2
            self.teacher = {
                name: momentum * value + (1 - momentum) * self.student[name] for name, value in self.teacher.items()
            }
            self.center = 0.9 * self.center + 0.1 * torch.cat(self.logits).mean(dim=0)
            self.steps, self.logits = self.steps + 1, []
        torch.testing.assert_close(doubles(pl_module.teacher), self.teacher, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(pl_module.loss.center.cpu().double(), self.center, rtol=1e-5, atol=1e-7)
        if not torch.equal(self.last_layer(pl_module), self.frozen):
            self.trained_in.add(trainer.current_epoch)


@on_devices
@in_precisions
@pytest.mark.parametrize("fused", [True, False])
def test_teacher_center_and_freeze_equal_the_ones_by_hand_under_accumulation(fused, dtype, device):
    """In float16, the first step overflows and is skipped; its logits count in the next center update."""
    freeze, by_hand = FreezeLastLayerCallback(1), ByHand()
    teacher = TeacherUpdateCallback(base_momentum=0.7)
    overflow = {"init_scale": 2.0**40, "backoff_factor": 2.0**-32}
    fit(training(fused), device, dtype, freeze, teacher, by_hand, scaler=overflow, accumulate_grad_batches=2)
    assert by_hand.total == 6
    assert by_hand.steps == teacher.steps_taken == 6 - (dtype == torch.float16)
    assert by_hand.types == {device}
    assert by_hand.trained_in == {1, 2}  # in epoch 0 the last layer is bitwise unchanged
    assert freeze.receipt.startswith(
        "student.head.last_layer frozen for 2 optimizer steps, bitwise unchanged on 1 of 1"
    )


@on_devices
@in_precisions
def test_a_nan_stops_the_run_before_it_reaches_any_weight(dtype, device):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = copy.deepcopy(pl_module.state_dict())
            if trainer.global_step == 5:
                batch[0][0, 0, 0, 0] = math.nan

    broken, module = Break(), training()
    start = copy.deepcopy(module.state_dict())
    message = "the loss is nan in epoch 1, at optimizer step 5: the outputs of teacher and student are not finite"
    with pytest.raises(FloatingPointError, match=message):
        fit(module, device, dtype, TeacherUpdateCallback(base_momentum=0.7), broken)
    for name, value in module.state_dict().items():
        assert torch.equal(value.cpu(), broken.before[name].cpu()), name
        assert value.isfinite().all()
    assert any(not torch.equal(value.cpu(), start[name]) for name, value in module.state_dict().items())


# Waiting for the device.


@contextmanager
def never_waiting(device):
    if device == "cpu":
        with without_reads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


WAITED = r"synchroniz|reads a value"
no_warning = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


@no_warning
@on_devices
@pytest.mark.parametrize("read", ["item", "tolist", "__bool__"])
def test_a_read_of_a_value_is_noticed(read, device):
    value = torch.ones(1, device=device)
    with pytest.raises(RuntimeError, match=WAITED), never_waiting(device):
        getattr(value, read)()
    getattr(value, read)()


@no_warning
@on_devices
@in_precisions
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
@pytest.mark.parametrize("factored", [True, False])
def test_head_loss_center_and_freeze_never_wait_for_the_device(factored, centering, dtype, device):
    head = DINOProjectionHead(16, 32, 8, 64, batch_norm=False, freeze_last_layer=1).to(device)
    loss, x = DINOLoss(64, centering=centering).to(device), torch.randn(4, 6, 16, device=device)
    loss.defer_center_update = True

    def step():
        call = head.factored_logits if factored else head
        with autocast(device, dtype):
            with torch.no_grad():
                teacher = call(x[:2])
            value = loss(teacher, call(x), epoch=0)
        value.backward()
        head.cancel_last_layer_gradients(current_epoch=0)
        loss.apply_center_update()

    step()  # libraries start at their first call
    with never_waiting(device):
        step()
    assert head.last_layer.weight_v.grad is None
    assert all(parameter.grad.isfinite().all() for parameter in head.layers.parameters())


@no_warning
@pytest.mark.gpu
@in_precisions
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_with_masks_on_the_cpu_a_step_on_masked_patches_never_waits_for_the_gpu(centering, dtype):
    head = DINOProjectionHead(16, 32, 8, 64, batch_norm=False).cuda()
    loss, tokens = IBOTPatchLoss(64, centering=centering).cuda(), torch.randn(8, 40, 16, device="cuda")

    def step():
        masks = random_block_masks(8, (40,))
        indices = masks.flatten().nonzero().squeeze(1).to("cuda", non_blocking=True)
        masked = tokens.flatten(0, 1).index_select(0, indices)
        with autocast("cuda", dtype):
            with torch.no_grad():
                teacher = head.factored_logits(masked)
            value = loss(teacher, head.factored_logits(masked), masks) + koleo_loss(tokens[:, 0])
        value.backward()

    step()  # libraries start at their first call
    with never_waiting("cuda"):
        step()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters() if parameter.requires_grad)


@no_warning
@on_devices
@in_precisions
def test_updates_of_metrics_never_wait_for_the_device(dtype, device):
    sides = [on(device, side, dtype) for side in factors()[:2]]
    voters, labels = (value.to(device) for value in clusters(90, seed=0))
    groups = torch.arange(90, device=device) % 7
    statistics, rank = DINOStatistics(200).to(device), RankMe(6).to(device)
    knn = KNNAccuracy(voters.to(dtype), labels, 5, groups=groups).to(device)

    def update():
        statistics.update(*sides, center=0.1)
        statistics.update(*(side.logits() for side in sides))
        rank.update(voters.to(dtype))
        knn.update(voters[:20].to(dtype), labels[:20], groups[:20])

    update()
    with never_waiting(device):
        update()
    assert knn.compute() > 0.4


class StrictLoss(DINOLoss):
    """A loss whose calls, with the hooks of TeacherUpdateCallback, never wait for the device."""

    def __call__(self, *arguments):
        with never_waiting(self.center.device.type):
            return super().__call__(*arguments)


class Strict:
    """Makes the hooks of callbacks never wait for the device in some steps."""

    # On the CPU, not `on_before_optimizer_step`: it reads the losses, on a GPU from a copy in main memory.
    hooks = ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end")

    def __init__(self, device, steps, *callbacks):
        self.seen = []
        for callback, hook in itertools.product(
            callbacks, self.hooks + ("on_before_optimizer_step",) * (device != "cpu")
        ):
            setattr(callback, hook, self.strict(getattr(callback, hook), device, steps))

    def strict(self, call, device, steps):
        def hook(trainer, *arguments):
            if trainer.fit_loop.total_batch_idx not in steps:
                return call(trainer, *arguments)
            self.seen.append(call.__name__)
            with never_waiting(device):
                return call(trainer, *arguments)

        return hook


@no_warning
@on_devices
@in_precisions
def test_hooks_of_the_rules_never_wait_for_the_device_in_an_ordinary_step(dtype, device):
    """They compare weights in the first steps and in the last one of an epoch, which are not ordinary."""
    rules = [
        FreezeLastLayerCallback(10),
        TeacherUpdateCallback(base_momentum=0.7),
        ScheduleCallback("weight_decay", (0.04, 0.4)),
        ScheduleCallback("loss.student_temp", (0.1, 0.2)),
    ]
    strict, module = Strict(device, range(9, 11), *rules), training()  # the second and third batch of the third epoch
    module.loss.__class__ = StrictLoss
    fit(module, device, dtype, *rules)
    assert set(strict.seen) >= {*Strict.hooks}
    assert rules[1].steps_taken == 12
    looks = Strict(device, range(1), *(again := [TeacherUpdateCallback(base_momentum=0.7)]))
    with pytest.raises(RuntimeError, match=WAITED):
        fit(training(), device, dtype, *again)  # the first step is one of the others
    assert looks.seen
