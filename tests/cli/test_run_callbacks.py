from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_dino import crops, tiny_dino
from helpers.toy_training import trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision

from dino_head import DINOLoss
from dino_head.cli.run_callbacks import CheckBackbone


@pytest.mark.parametrize(("plugin", "weights", "expected"), [
    (MixedPrecision("bf16-mixed", "cpu"), torch.float32, torch.bfloat16),
    (HalfPrecision("bf16-true"), torch.bfloat16, torch.bfloat16),
])  # fmt: skip
def test_the_check_runs_in_the_precision_of_the_run(plugin, weights, expected):
    module, seen = tiny_dino().to(weights), []
    module.student["head"].register_forward_hook(lambda module, args, out: seen.append(out.z.dtype))
    images, random = torch.randn(4, 1, 8, 8), torch.get_rng_state()
    module.augment = lambda images: [image + torch.rand_like(image) for image in crops(images)]
    CheckBackbone().on_train_batch_start(SimpleNamespace(precision_plugin=plugin), module, images, 0)
    assert seen == [expected] * 2  # for two sizes of views
    assert torch.equal(torch.get_rng_state(), random)
    assert not module.loss.center.any()


def test_a_loss_of_another_size_is_refused_before_the_first_step():
    module = tiny_dino()
    module.loss = DINOLoss(32)
    module.training_step = lambda *args: pytest.fail("a step")
    message = r"made for 32 prototypes \(output_dim\), got a teacher with 16"
    with pytest.raises(ValueError, match=message):
        trainer(CheckBackbone()).fit(module, torch.utils.data.DataLoader(torch.randn(8, 1, 8, 8), batch_size=4))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_example_trains_in_the_type_of_its_weights(precision):
    """Its augmentation may return views of another type."""
    module = tiny_dino(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    augment = module.augment
    module.augment = lambda images: [view.float() for view in augment(images)]
    data = torch.utils.data.DataLoader(torch.randn(8, 1, 8, 8), batch_size=4)
    run = trainer(CheckBackbone(), max_epochs=1, precision=precision)
    run.fit(module, data)
    assert run.global_step == 2
    assert module.loss.center.dtype == torch.float32
