"""Whole runs with the authors' losses and heads: the example module and the callbacks, and a plain loop, equal them."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.toy_training import trainer
from lightning.pytorch import Callback
from torch import nn

from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss, koleo_loss, multicrop_forward, parameter_groups
from dino_head.callbacks import ScheduleCallback, TeacherUpdateCallback
from dino_head.examples.dinov2_module import DINOv2

REFERENCE = Path(__file__).parents[1] / "reference"
RUNS = {"center": 1e-5, "sinkhorn_shared_head": 1e-4}  # with the largest relative difference
TERMS = ("dino", "koleo", "ibot", "total", "grad_norm_backbone")


class ToyBackbone(nn.Module):
    """Patches (V, n, P) -> class tokens (V, D) and patch tokens (V, n, D)."""

    patch_size = (1,)

    def __init__(self, patches, patch_width, features):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(patches, features))
        self.mask_token = nn.Parameter(torch.zeros(1, features))  # a matrix, because the authors decay it
        self.patch_embed = nn.Linear(patch_width, features)
        self.mix, self.norm = nn.Linear(features, features), nn.LayerNorm(features)
        self.cls, self.cls_norm = nn.Linear(features, features), nn.LayerNorm(features)

    def forward(self, images, masks=None):
        tokens = self.patch_embed(images)
        if masks is not None:
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token, tokens)
        tokens = tokens + self.pos_embed[: images.shape[1]]
        tokens = tokens + self.mix(nn.functional.gelu(tokens.mean(dim=1, keepdim=True)))
        return self.cls_norm(self.cls(tokens.mean(dim=1))), self.norm(tokens)


class Reference:
    def __init__(self, name):
        with np.load(REFERENCE / f"trajectory_dinov2_{name}.npz") as values:
            self.values = dict(values)
        self.config = json.loads(str(self.values["config"]))
        self.tolerance = RUNS[name]

    def __getitem__(self, name):
        if name == "dino":
            return self["dino_local"] + self["dino_global"]
        if name == "koleo":  # recorded with its weight
            return 10 * torch.from_numpy(self.values["koleo"])
        return torch.from_numpy(self.values[name])

    def weights(self, prefix):
        """The authors' `dino_head.mlp.{i}` are our `head.layers.{i}`; an unused second head is left out."""
        renamed = {}
        for key in self.values:
            part, _, name = key.removeprefix(prefix).partition(".")
            if key.startswith(prefix) and (part != "ibot_head" or self.config["separate_head"]):
                part = {"dino_head": "head", "ibot_head": "patch_head"}.get(part, part)
                value = self[key][None] if name == "mask_token" else self[key]
                renamed[f"{part}.{name}".replace("mlp.", "layers.")] = value
        return renamed

    def parts(self):
        config = self.config
        is_separate = config["separate_head"]
        sizes = config["features"], config["hidden"], config["bottleneck"]
        counts = [config["prototypes"], config["ibot_prototypes"]] if is_separate else [config["prototypes"]]
        heads = [DINOProjectionHead(*sizes, count, False, norm_last_layer=False) for count in counts]
        centering = "sinkhorn" if config["centering"] == "sinkhorn" else "mean"
        losses = [
            kind(count, warmup_teacher_temp_epochs=0, centering=centering)
            for kind, count in zip((DINOLoss, IBOTPatchLoss), (counts[0], counts[-1]), strict=True)
        ]
        return ToyBackbone(config["global_patches"], config["patch_width"], config["features"]), heads, losses

    def views(self, step):
        return [*self["global_crops"][step], *self["local_crops"][step]]


class Given(DINOv2):
    """The example module with the views, masks and rates of a reference."""

    reference: Reference

    def views(self, batch, batch_idx):
        return self.reference.views(batch_idx), self.reference["masks"][batch_idx]

    def log_dict(self, terms, **options):
        self.terms = {name: value.detach() for name, value in terms.items()}

    def rate(self, step):
        rates = self.reference["lr"]
        return float(rates[min(step, len(rates) - 1)]) / self.learning_rate


class Watch(Callback):
    """Notes the terms, the norm of the backbone's gradient before clipping, and the centers after each step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [parameter.grad for parameter in pl_module.student["backbone"].parameters()]
        self.norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        terms = pl_module.terms
        values = {name: terms[name] for name in ("dino", "koleo", "ibot")} | {"total": terms["loss"]}
        values["grad_norm_backbone"] = self.norm
        for name, loss in (("center_dino", pl_module.loss), ("center_ibot", pl_module.patch_loss)):
            if loss.center is not None:
                values[name] = loss.center.flatten().clone()
        self.steps.append(values)


def run_module(reference):
    config, (backbone, heads, losses) = reference.config, reference.parts()
    module = Given(
        backbone,
        heads[0],
        *losses,
        augment=list,
        patch_head=heads[1] if config["separate_head"] else None,
        learning_rate=config["lr"],
        layer_decay=1.0,
        patch_embed_lr_mult=1.0,
        clip=config["clip"],
    )
    module.reference = reference
    for side in (module.student, module.teacher):
        side.load_state_dict(reference.weights("init/"))

    def temperature(step, total):
        return float(reference["teacher_temp"][step])

    watch = Watch()
    rules = [
        TeacherUpdateCallback(base_momentum=config["momentum"][0]),
        ScheduleCallback("weight_decay", tuple(config["wd"])),
        ScheduleCallback("loss.teacher_temp", temperature),
        ScheduleCallback("patch_loss.teacher_temp", temperature),
    ]
    trainer(*rules, watch, max_epochs=1).fit(module, range(config["steps"]))
    return watch.steps, module.student.state_dict(), module.teacher.state_dict()


def run_loop(reference):
    """The same with torch's own loop."""
    config, (backbone, heads, (loss, patch_loss)) = reference.config, reference.parts()
    student = nn.ModuleDict({"backbone": backbone, "head": heads[0]})
    if config["separate_head"]:
        student["patch_head"] = heads[1]
    student.load_state_dict(reference.weights("init/"))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(student, 1.0))
    loss.defer_center_update = patch_loss.defer_center_update = True
    steps = []
    for step in range(config["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = float(reference["lr"][step])
            group["weight_decay"] = float(reference["wd"][step]) if group["weight_decay"] else 0.0
        views, masks = reference.views(step), reference["masks"][step]
        indices = masks.flatten().nonzero().squeeze(1)
        outputs = []
        for side, own_views, own_masks in ((student, views, masks), (teacher, views[:2], None)):
            tokens, patches = multicrop_forward(side["backbone"], own_views, own_masks)
            masked = torch.cat(patches[:2]).flatten(0, 1).index_select(0, indices)
            heads = side["head"], side["patch_head" if "patch_head" in side else "head"]
            outputs.append((tokens, heads[0](tokens), heads[1](masked)))
        (tokens, student_out, student_patches), (_, teacher_out, teacher_patches) = outputs
        temp = float(reference["teacher_temp"][step])
        terms = {
            "dino": loss(teacher_out, student_out, teacher_temp=temp),
            "ibot": patch_loss(teacher_patches, student_patches, masks, teacher_temp=temp),
            "koleo": koleo_loss(tokens[0]) + koleo_loss(tokens[1]),
        }
        terms["total"] = terms["dino"] + terms["ibot"] + 0.1 * terms["koleo"]
        optimizer.zero_grad()
        terms["total"].backward()
        norms = [nn.utils.clip_grad_norm_(part.parameters(), config["clip"]) for part in student.values()]
        optimizer.step()
        momentum = float(reference["momentum"][step])
        with torch.no_grad():
            for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
                theirs.lerp_(ours, 1 - momentum)
        values = {**terms, "grad_norm_backbone": norms[0]}
        for name, module in (("center_dino", loss), ("center_ibot", patch_loss)):
            module.apply_center_update()
            if module.center is not None:
                values[name] = module.center.flatten().clone()
        steps.append({name: value.detach() for name, value in values.items()})
    return steps, student.state_dict(), teacher.state_dict()


WAYS = {"module": run_module, "loop": run_loop}


@pytest.fixture(scope="module", params=[(name, way) for name in RUNS for way in WAYS], ids="-".join)
def run(request):
    name, way = request.param
    reference = Reference(name)
    return reference, *WAYS[way](reference)


def worst(ours, theirs):
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_each_term_of_each_step(run):
    reference, steps, *_ = run
    for name in TERMS:
        ours = torch.stack([values[name] for values in steps])
        difference = ((ours - reference[name]) / reference[name]).abs().max().item()
        assert difference < reference.tolerance, (name, difference)


def test_both_centers_after_each_step(run):
    reference, steps, *_ = run
    names = [name for name in ("center_dino", "center_ibot") if name in reference.values]
    assert len(names) == (2 if reference.config["centering"] != "sinkhorn" else 0)
    for name in names:
        assert worst(torch.stack([values[name] for values in steps]), reference[name]) < reference.tolerance


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_final_weights(run, side):
    reference, _, *states = run
    ours = states[0] if side == "student" else states[1]
    theirs, before = reference.weights(f"final_{side}/"), reference.weights("init/")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = worst(ours[name], value)
        assert difference < reference.tolerance, (name, difference)
        assert not torch.equal(value, before[name])
