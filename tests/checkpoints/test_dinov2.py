"""The heads of DINOv2 for class tokens and masked patches, and their centers, in the layouts of other projects.

The keys and shapes are those of the code of each project: dinov2 (train.py, ssl_meta_arch.py), dinov3, lightly
(examples/pytorch_lightning/dinov2.py), lightly-train (two releases) and stable-pretraining (methods/dinov2.py).
"""

import itertools

import pytest
import torch
from helpers.toy_training import trainer
from torch import nn
from torch.utils.data import DataLoader

from dino_head import DINOLoss, DINOProjectionHead, IBOTPatchLoss
from dino_head.callbacks import TeacherUpdateCallback
from dino_head.checkpoints import export_head, load_head
from dino_head.examples.dinov2_module import DINOv2

SIDES, KINDS = ("student", "teacher"), ("cls", "patch")
PROTOTYPES = {"cls": 12, "patch": 10}


def trained_head(kind, seed):
    """A head in which no value is its initial one, as DINOv2 has them: no batch norm, trained norms."""
    torch.manual_seed(seed)
    head = DINOProjectionHead(6, 8, 4, PROTOTYPES[kind], batch_norm=False, norm_last_layer=False)
    for parameter in head.parameters():
        parameter.data.uniform_(0.5, 1.5).mul_(torch.randint(0, 2, parameter.shape) * 2 - 1)
    return head


def heads():
    pairs = itertools.product(SIDES, KINDS)
    return {pair: trained_head(pair[1], seed) for seed, pair in enumerate(pairs)}


def outputs(head):
    return head(torch.randn(5, 6, generator=torch.Generator().manual_seed(9)))


def state(heads, layout, path):
    """The heads' state dict with the keys of a project; `path` maps side and kind to the path of a head."""
    exported = {pair: export_head(head, layout) for pair, head in heads.items()}
    return {f"{path(*pair)}.{key}": value for pair, tensors in exported.items() for key, value in tensors.items()}


CENTERS = {"cls": torch.arange(12.0), "patch": torch.arange(10.0) + 1}
BACKBONE = {"teacher.backbone.blocks.0.mlp.fc1.weight": torch.ones(3, 3), "teacher.backbone.mask_token": torch.ones(3)}
META = {"cls": "dino_head", "patch": "ibot_head"}
LIGHTLY_TRAIN = {"cls": "dino_head._dino_head", "patch": "ibot_head._ibot_head"}
OURS = {"cls": "head", "patch": "patch_head"}

# Name -> (layout, entry of the file, path of a head, {kind: key and shape of its center}).
PROJECTS = {
    "dinov2": (
        "dino", "model", lambda side, kind: f"{side}.{META[kind]}",
        {"cls": ("dino_loss.center", (1, 12)), "patch": ("ibot_patch_loss.center", (1, 1, 10))},
    ),
    "dinov3": (
        "dinov3", "model", lambda side, kind: f"{side}.{META[kind]}",
        {"cls": ("dino_loss.center", (1, 12)), "patch": ("ibot_patch_loss.center", (1, 1, 10))},
    ),
    "lightly": (
        "lightly", "state_dict", lambda side, kind: f"{side}_head.{META[kind]}",
        {"cls": ("dino_criterion.center", (1, 1, 12)), "patch": ("ibot_criterion.center.center", (1, 10))},
    ),
    "lightly-train": (
        "lightly-train", "state_dict", lambda side, kind: f"{side}_head.{META[kind]}",
        {"cls": ("dino_loss.center", (1, 12)), "patch": ("ibot_loss.center", (1, 1, 10))},
    ),
    "lightly-train, with lightly's head": (
        "lightly", "state_dict", lambda side, kind: f"{side}_{LIGHTLY_TRAIN[kind]}",
        {"cls": ("dino_loss.center", (1, 12)), "patch": ("ibot_loss.center", (1, 1, 10))},
    ),
    "this library": (
        "lightly", "state_dict", lambda side, kind: f"{side}.{OURS[kind]}",
        {"cls": ("loss.center", (1, 1, 12)), "patch": ("patch_loss.center", (1, 1, 10))},
    ),
}  # fmt: skip


@pytest.fixture(params=PROJECTS)
def project(request, tmp_path):
    """Heads and a file with them in the layout of a project."""
    layout, entry, path, centers = PROJECTS[request.param]
    saved = heads()
    tensors = state(saved, layout, path) | BACKBONE
    tensors |= {key: CENTERS[kind].reshape(shape) for kind, (key, shape) in centers.items()}
    file = tmp_path / "file.pth"
    torch.save({entry: tensors, "iteration": 3}, file)
    return saved, file, path


@pytest.mark.parametrize("exists", [False, True], ids=["a new head", "a head that exists"])
def test_the_heads_for_class_tokens_and_patches_load_by_their_paths(project, exists):
    saved, file, path = project
    for (side, kind), head in saved.items():
        target = trained_head(kind, 100) if exists else None
        loaded = load_head(file, path(side, kind), head=target)
        assert loaded.last_layer.weight.shape == (PROTOTYPES[kind], 4)
        torch.testing.assert_close(outputs(loaded), outputs(head))


def test_a_side_with_two_heads_raises_and_lists_both(project):
    _, file, path = project
    for side in SIDES:
        with pytest.raises(ValueError, match=f"2 heads match part='{side}'") as error:
            load_head(file, side)
        assert [kind for kind in KINDS if f"{path(side, kind)}'" in str(error.value)] == [*KINDS]


def test_a_part_that_matches_both_sides_raises_and_lists_both():
    tensors = state(heads(), "dino", PROJECTS["dinov2"][2])
    with pytest.raises(ValueError, match=r"2 heads match part='ibot_head': 'student.ibot_head', 'teacher.ibot_head'"):
        load_head(tensors, "ibot_head")


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_file_of_an_evaluation_of_dinov2(kind):
    """It has no sides; the paths end with the kind."""
    teacher = {pair[1]: head for pair, head in heads().items() if pair[0] == "teacher"}
    tensors = {
        f"{META[name]}.{key}": value
        for name, head in teacher.items()
        for key, value in export_head(head, "dino").items()
    }
    loaded = load_head({"teacher": tensors}, META[kind])
    torch.testing.assert_close(outputs(loaded), outputs(teacher[kind]))


@pytest.mark.parametrize(("name", "paths"), [
    ("lightly", ("teacher_head.dino_head", "teacher_head.ibot_head")),
    ("lightly-train, with lightly's head", ("teacher_dino_head._dino_head", "teacher_ibot_head._dino_head")),
])  # fmt: skip
def test_a_shared_head_that_is_saved_under_both_paths_loads_from_each(name, paths):
    head = trained_head("cls", 0)
    tensors = {f"{path}.{key}": value for path in paths for key, value in export_head(head, PROJECTS[name][0]).items()}
    for path in paths:
        torch.testing.assert_close(outputs(load_head(tensors, path)), outputs(head))


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_of_stable_pretraining_load_after_renaming(kind):
    """A Sequential with plain prototypes at its end, as docs/weights.md renames it."""
    layers = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4), nn.Identity()]
    theirs = nn.Sequential(*layers, nn.Linear(4, PROTOTYPES[kind], bias=False))
    prefix = f"{kind}_head.teacher."
    tensors = {f"{prefix}{key}": value for key, value in theirs.state_dict().items()}
    renamed = {key.replace(prefix, "mlp."): value for key, value in tensors.items()}
    renamed["last_layer.weight"] = renamed.pop("mlp.6.weight")
    x = torch.randn(5, 6)
    expected = theirs[-1](nn.functional.normalize(theirs[:-1](x), dim=-1))
    torch.testing.assert_close(load_head(renamed)(x), expected)


@pytest.mark.parametrize("name", PROJECTS)
def test_the_centers_load_into_both_losses(name):
    for kind, (key, shape) in PROJECTS[name][3].items():
        loss = {"cls": DINOLoss, "patch": IBOTPatchLoss}[kind](PROTOTYPES[kind])
        loss.load_state_dict({"center": CENTERS[kind].reshape(shape)})
        assert loss.center.shape == (1, 1, PROTOTYPES[kind]), key
        assert torch.equal(loss.center.flatten(), CENTERS[kind])


@pytest.mark.parametrize("shape", [(10,), (1, 10), (1, 1, 10)])
def test_a_center_of_patches_loads_in_every_shape_and_type(shape):
    loss = IBOTPatchLoss(10)
    loss.load_state_dict({"center": CENTERS["patch"].reshape(shape).half()})
    assert loss.center.dtype == torch.float32
    assert torch.equal(loss.center, CENTERS["patch"].reshape(1, 1, 10))
    with pytest.raises(RuntimeError, match=r"10 prototypes, but this IBOTPatchLoss has output_dim=12"):
        IBOTPatchLoss(12).load_state_dict({"center": CENTERS["patch"].reshape(shape)})


class Patches(nn.Module):
    """Images (B, 3, H, W) -> mean of the patch tokens (B, 6), and patch tokens (B, N, 6)."""

    patch_size = (4, 4)

    def __init__(self):
        super().__init__()
        self.patch_embed, self.mask_token = nn.Conv2d(3, 6, 4, 4), nn.Parameter(torch.zeros(1, 6))

    def forward(self, images, masks=None):
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        if masks is not None:
            tokens = torch.where(masks[..., None], self.mask_token, tokens)
        return tokens.mean(dim=1), tokens


@pytest.mark.parametrize("is_separate", [True, False], ids=["separate heads", "a shared head"])
def test_the_heads_of_a_run_of_the_example_load_and_export(is_separate, tmp_path):
    kinds = KINDS if is_separate else ("cls",)
    parts = [trained_head(kind, seed) for seed, kind in enumerate(kinds)]
    losses = DINOLoss(12), IBOTPatchLoss(PROTOTYPES[kinds[-1]])
    options = {"layer_decay": 1.0, "learning_rate": 0.01, "warmup_epochs": 0}
    model = DINOv2(Patches(), parts[0], *losses, lambda x: [x, x.flip(-1)], *parts[1:], **options)
    run = trainer(TeacherUpdateCallback(base_momentum=0.5), max_epochs=1)
    run.fit(model, DataLoader(torch.randn(8, 3, 16, 16), batch_size=4))
    run.save_checkpoint(tmp_path / "run.ckpt")
    for side, kind in itertools.product(SIDES, kinds):
        head = getattr(model, side)[OURS[kind]]
        loaded = load_head(tmp_path / "run.ckpt", f"{side}.{OURS[kind]}" if is_separate else side)
        torch.testing.assert_close(outputs(loaded), outputs(head))
        back = load_head(export_head(head, "dino"))
        torch.testing.assert_close(outputs(back), outputs(head))
    assert not torch.allclose(outputs(model.student["head"]), outputs(model.teacher["head"]))
    centers = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    for name, loss in (("loss", model.loss), ("patch_loss", model.patch_loss)):
        fresh = type(loss)(loss.output_dim)
        fresh.load_state_dict({"center": centers[f"{name}.center"]})
        assert torch.equal(fresh.center, loss.center)
        assert loss.center.any()
