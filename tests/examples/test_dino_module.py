import copy
import math
import warnings

import pytest
import torch
from helpers.tiny_dino import TinyDINO, TinyTokens, TinyViT, crops, tiny_dino, view_loader
from helpers.toy_training import trainer
from torch import nn
from torch.utils.data import DataLoader

from dino_head import DINOLoss, DINOProjectionHead, FactoredLogits, dino_loss
from dino_head.callbacks import FreezeLastLayerCallback, TeacherUpdateCallback
from dino_head.examples.dino_module import DINO


def test_a_training_step_returns_the_loss_of_the_definition():
    torch.manual_seed(0)
    module = tiny_dino()
    for parameter in module.student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # away from the teacher
    images = torch.randn(4, 1, 8, 8)
    views = crops(images)

    def logits(side, views):
        return torch.stack([side["head"](side["backbone"](view)) for view in views])

    expected = dino_loss(logits(module.teacher, views[:2]), logits(module.student, views), teacher_temp=0.04)
    module.log = lambda *args, **kwargs: None
    module._trainer = trainer()
    assert module.training_step(images, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_never_computes_the_logits(monkeypatch):
    monkeypatch.setattr(FactoredLogits, "logits", lambda *args: pytest.fail("multiplied"))
    trainer(max_epochs=1).fit(tiny_dino(), view_loader())


def test_a_run_on_logits_ends_with_the_same_weights():
    class OnLogits(TinyDINO):
        def outputs(self, side, views):
            return super().outputs(side, views).logits()

    states = []
    for kind in (TinyDINO, OnLogits):
        torch.manual_seed(0)
        module = tiny_dino(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        module.__class__ = kind
        start = copy.deepcopy(module.state_dict())
        trainer(FreezeLastLayerCallback(), TeacherUpdateCallback(base_momentum=0.9)).fit(module, view_loader())
        states.append(module.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)
    assert not torch.equal(start["student.head.last_layer.weight_v"], states[0]["student.head.last_layer.weight_v"])


def test_teacher_and_student_start_equal_and_only_the_student_is_trained():
    module = tiny_dino()
    for (name, student), teacher in zip(
        module.student.state_dict().items(), module.teacher.state_dict().values(), strict=True
    ):
        assert torch.equal(student, teacher), name
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert all(s is not t for s, t in zip(module.student.parameters(), module.teacher.parameters(), strict=True))


def test_weight_decay_is_for_matrices_and_all_trained_parameters_are_optimized():
    module = tiny_dino(weight_decay=0.1)
    module.student["head"] = nn.Sequential(nn.LayerNorm(4), module.student["head"])
    seen = {}

    def spy():
        result = DINO.configure_optimizers(module)
        seen.update(result)
        return result

    module.configure_optimizers = spy
    module.student["head"].factored_logits = module.student["head"][1].factored_logits
    trainer(max_steps=1).fit(module, view_loader())
    decayed, others = seen["optimizer"].param_groups
    names = {id(p): name for name, p in module.student.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        "backbone.0.weight",
        "head.1.layers.0.weight",
        "head.1.layers.2.weight",
        "head.1.layers.4.weight",
        "head.1.last_layer.weight_v",
    }
    trained = {name for name, p in module.student.named_parameters() if p.requires_grad}
    assert {names[id(p)] for p in decayed["params"] + others["params"]} == trained


def test_the_learning_rate_warms_up_and_falls_by_steps():
    rates = []

    class Watched(type(tiny_dino())):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    module = tiny_dino(learning_rate=1.0, min_learning_rate=1e-3, warmup_epochs=1)
    module.__class__ = Watched
    trainer(max_epochs=3, accumulate_grad_batches=2).fit(module, view_loader(batches=4))
    # 2 optimizer steps an epoch: warm-up over the first 2, then 4 of a cosine from 1 towards 0.001.
    by_step = rates[::2]
    assert by_step == pytest.approx([0.0, 1.0, 1.0, 0.8537, 0.5005, 0.1473], abs=1e-3)


@pytest.mark.parametrize(("warmup_epochs", "epochs", "steps"), [(10, 5, 2), (6, 5, 2), (5, 5, 20), (4, 5, 16)])
def test_a_warm_up_longer_than_the_run_takes_a_tenth_of_it_and_warns(warmup_epochs, epochs, steps):
    rates = []

    class Watched(TinyDINO):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    module = tiny_dino(learning_rate=1.0, min_learning_rate=0.0, warmup_epochs=warmup_epochs)
    module.__class__ = Watched
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        trainer(max_epochs=epochs).fit(module, view_loader(batches=4))
    warm_up, cosine = rates[:steps], rates[steps:]
    assert warm_up == pytest.approx([step / (steps - 1) for step in range(steps)])
    count = len(cosine)
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * step / count)) for step in range(count)])
    message = f"warmup_epochs={warmup_epochs} is longer than the run: warming up in its first tenth"
    assert [str(warning.message) for warning in caught].count(message) == (warmup_epochs > epochs)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_batches_of_any_form(form):
    class OfDicts(DINO):
        def images(self, batch):
            return batch["image"]

    module = tiny_dino()
    if form == "dict":
        module.__class__ = type("TinyOfDicts", (OfDicts, type(module)), {})
    images = torch.randn(8, 1, 8, 8)
    items = {
        "tensor": list(images),
        "tuple": [(image, 0) for image in images],
        "dict": [{"image": image} for image in images],
    }[form]
    before = module.student["backbone"][0].weight.clone()
    trainer(max_epochs=1).fit(module, DataLoader(items, batch_size=4))
    assert not torch.equal(module.student["backbone"][0].weight, before)


def test_validation_and_predict_change_no_buffer_and_no_teacher():
    module = tiny_dino()
    module.validation_step = lambda batch, batch_idx: module.loss(torch.randn(2, 4, 16), torch.randn(2, 4, 16))
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    before = copy.deepcopy(module.state_dict())
    run = trainer(FreezeLastLayerCallback(), TeacherUpdateCallback())
    run.validate(module, view_loader(), verbose=False)
    (features, *_) = run.predict(module, view_loader())
    assert features.shape == (4, 4)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())


def test_the_class_tokens_of_a_backbone_with_patch_tokens_are_trained():
    crops_of_patches = lambda images: [images, images.flip(-1), images[..., :4, :4]]  # noqa: E731
    states, images = [], torch.randn(2, 1, 8, 8)
    for backbone in (TinyViT, TinyTokens):
        torch.manual_seed(0)
        head = DINOProjectionHead(16, 8, 4, 16, batch_norm=False)
        module = TinyDINO(backbone(), head, DINOLoss(16), crops_of_patches, warmup_epochs=0)
        start = module.student["backbone"].embed.weight.clone()
        trainer(TeacherUpdateCallback(base_momentum=0.9), max_epochs=1).fit(module, view_loader())
        states.append({**module.state_dict(), "features": module(images)})
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert not torch.equal(start, states[1]["student.backbone.embed.weight"])
