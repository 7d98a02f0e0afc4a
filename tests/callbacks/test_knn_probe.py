import copy
import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
from helpers import distributed_fits
from helpers.processes import run_in_processes
from helpers.tiny_dino import TinyDINO, TinyTokens, TinyViT, tiny_dino, view_loader
from helpers.toy_training import rules, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from dino_head import DINOLoss, DINOProjectionHead
from dino_head.callbacks import KNNProbeCallback
from dino_head.examples.dino_module import DINO
from dino_head.metrics import KNNAccuracy
from dino_head.vision import ResumableLoader

# Most of these runs only need a module to probe.
pytestmark = [
    pytest.mark.filterwarnings("ignore:teacher does not follow"),
    pytest.mark.filterwarnings(
        "ignore:the teacher's batch norm|the teacher acts randomly"
    ),  # modes that the probe has to restore
]


def seeded(**options):
    torch.manual_seed(0)
    return tiny_dino(**options)


def labelled(samples=48, seed=3, classes=3, **options):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    images = torch.randn(samples, 1, 8, 8, generator=generator) + 0.3 * labels[:, None, None, None]
    return DataLoader(TensorDataset(images, labels), **{"batch_size": 10, **options})


def probe(train=None, test=None, **options):
    train, test = labelled() if train is None else train, labelled(20, seed=4) if test is None else test
    return KNNProbeCallback(train, test, **{"k": 5, **options})


def fit(module, *callbacks, data=None, **options):
    run = trainer(*callbacks, **options)
    run.fit(module, data or view_loader())
    return run


def accuracy(module, train, test, k=5, **groups):
    """By hand: the teacher's backbone in evaluation mode."""
    backbone = copy.deepcopy(module.teacher["backbone"]).eval()
    with torch.no_grad():
        knn = KNNAccuracy(backbone(train.dataset.tensors[0]), train.dataset.tensors[1], k)
        knn.update(backbone(test.dataset.tensors[0]), test.dataset.tensors[1])
    return knn.compute().item()


class ByHand(Callback):
    """Computes the accuracy by hand at the end of each epoch."""

    def __init__(self):
        self.expected = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.expected.append(accuracy(pl_module, labelled(), labelled(20, seed=4)))


def test_the_accuracy_is_that_of_the_teachers_features():
    watch, by_hand, module = probe(), ByHand(), seeded()
    for side in (module.student, module.teacher):
        side["backbone"].append(nn.Dropout(0.9))
    run = fit(module, *rules(), watch, by_hand)
    assert [(row["epoch"], row["step"]) for row in watch.history] == [(0, 4), (1, 8), (2, 12)]
    assert [row["top1"] for row in watch.history] == pytest.approx(by_hand.expected)
    assert run.callback_metrics["knn/top1"].item() == pytest.approx(by_hand.expected[-1])
    assert "knn/top1" in run.progress_bar_metrics
    assert 0.4 < by_hand.expected[-1] < 1


def test_the_first_each_nth_and_the_last_epoch_are_probed():
    watch = probe(every_n_epochs=3)
    fit(seeded(), watch, max_epochs=8)
    assert [row["epoch"] for row in watch.history] == [0, 2, 5, 7]
    watch = probe(every_n_epochs=3)
    fit(seeded(), watch, max_epochs=-1, max_steps=16)
    assert [row["epoch"] for row in watch.history] == [0, 2, 3]


class Validated(TinyDINO):
    def validation_step(self, batch, batch_idx):
        self.log("val", 0.0)


def test_the_value_is_logged_before_validation_ends():
    class Look(Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append(float(trainer.callback_metrics.get("knn/top1", math.nan)))

    module, watch, seen = seeded(), probe(), []
    module.__class__ = Validated
    trainer(*rules(), Look(), watch, val_check_interval=0.5).fit(module, view_loader(), view_loader())
    assert [(row["epoch"], row["step"]) for row in watch.history] == [(e, 4 * e + s) for e in range(3) for s in (2, 4)]
    assert seen == pytest.approx([row["top1"] for row in watch.history])


@pytest.mark.parametrize("validation", [True, False])
def test_checkpoints_and_early_stopping_can_monitor_it(validation, tmp_path):
    module, watch = seeded(), probe(every_n_epochs=2)
    options = {}
    if validation:
        module.__class__ = Validated
        options = {"num_sanity_val_steps": 1}
    best = ModelCheckpoint(tmp_path, monitor="knn/top1", mode="max", save_top_k=-1)
    stop = EarlyStopping("knn/top1", mode="max", patience=2, min_delta=2.0)
    run = trainer(*rules(), watch, best, stop, enable_checkpointing=True, max_epochs=6, **options)
    run.fit(module, view_loader(), view_loader() if validation else None)
    assert run.current_epoch == 3
    assert best.best_model_score.item() == max(row["top1"] for row in watch.history)
    assert [row["epoch"] for row in watch.history] == [0, 1]


def test_the_sanity_check_and_validate_do_not_probe():
    module, watch = seeded(), probe()
    module.__class__ = Validated
    seen = []

    class Sanity(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.append(list(watch.history))

    run = trainer(watch, Sanity(), num_sanity_val_steps=2)
    run.fit(module, view_loader(), view_loader())
    run.validate(module, view_loader())
    assert seen == [[]]
    assert len(watch.history) == 3


class Noisy(TensorDataset):
    """Draws random numbers of all kinds for each sample."""

    def __getitem__(self, index):
        images, labels = super().__getitem__(index)
        return images + 0.1 * torch.rand(1) + 0.1 * np.random.rand() + 0.1 * random.random(), labels  # noqa: NPY002


class Modes(Callback):
    """Sets one module to evaluation mode, and records the modes of all at each batch."""

    def __init__(self):
        self.modes = []

    def on_train_start(self, trainer, pl_module):
        pl_module.teacher["backbone"][1].eval()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes.append([module.training for module in pl_module.modules()])


def random_run(*callbacks, generator=None):
    """Everything that could differ: weights, modes, and random states at the end."""
    module = seeded()
    for side in (module.student, module.teacher):
        side["backbone"] = nn.Sequential(side["backbone"], nn.BatchNorm1d(4), nn.Dropout(0.2))
    module.teacher.requires_grad_(False)
    data = DataLoader(view_loader().dataset, batch_size=4, shuffle=True, generator=generator)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    modes = Modes()
    fit(module, *rules(), *callbacks, modes, data=data)
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    return module.state_dict(), modes.modes, states, None if generator is None else generator.get_state()


def test_training_is_bitwise_the_same_without_the_callback():
    noisy = [Noisy(*labelled().dataset.tensors), Noisy(*labelled(20, seed=4).dataset.tensors)]
    loaders = [DataLoader(data, batch_size=8, shuffle=True) for data in noisy]
    without, watch = random_run(), probe(*loaders)
    with_it = random_run(watch)
    assert len(watch.history) == 3
    torch.testing.assert_close(without[0], with_it[0], rtol=0, atol=0)
    assert without[1] == with_it[1]
    torch.testing.assert_close(without[2], with_it[2], rtol=0, atol=0)


def test_a_generator_that_training_and_probe_share_is_restored():
    generator = torch.Generator().manual_seed(7)
    without = random_run(generator=generator)
    generator.manual_seed(7)
    data = labelled().dataset
    watch = probe(DataLoader(data, batch_size=8, sampler=RandomSampler(data, generator=generator), generator=generator))
    with_it = random_run(watch, generator=generator)
    torch.testing.assert_close(without, with_it, rtol=0, atol=0)
    batches = BatchSampler(RandomSampler(data, generator=generator), 8, drop_last=False)
    generator.manual_seed(7)
    torch.testing.assert_close(
        without, random_run(probe(DataLoader(data, batch_sampler=batches)), generator=generator), rtol=0, atol=0
    )
    watch = probe(DataLoader(data, batch_size=8, shuffle=True, generator=generator))
    generator.manual_seed(7)
    torch.testing.assert_close(without, random_run(watch, generator=generator), rtol=0, atol=0)


def test_training_is_bitwise_the_same_when_a_probe_fails():
    broken = labelled()
    broken.dataset.tensors[0].fill_(math.nan)
    with pytest.warns(UserWarning, match="knn/top1 has no value"):
        torch.testing.assert_close(random_run(), random_run(probe(broken)), rtol=0, atol=0)


def without_labels():
    return DataLoader(TensorDataset(torch.randn(20, 1, 8, 8)), batch_size=10)


class Corrupt(TensorDataset):
    def __getitem__(self, index):
        raise OSError("truncated")


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": without_labels()}, r"labels are missing: batches must be \(inputs, labels\).* got a list of 1"),
        ({"test": DataLoader(torch.randn(20, 1, 8, 8))}, "labels are missing: .* got a Tensor"),
        ({"k": 49}, "k=49 voters are needed, got 48"),
        ({"train": labelled(classes=1)}, "all 48 voters have the label 0"),
        ({"train": DataLoader(Stream([]), batch_size=None)}, "there is no data: the loader yielded no batch"),
        ({"test": []}, "there is no data"),
        ({"test": [(torch.randn(4, 1, 8, 8), torch.rand(4))]}, "labels and groups must be tensors of integers"),
        ({"test": [([torch.randn(4, 1, 8, 8)] * 2, torch.zeros(4).long())]}, "TypeError: "),  # views
        ({"test": [{"image": torch.randn(4, 1, 8, 8)}]}, "labels are missing: .* got a dict"),
        ({"test": [(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long())]}, "RuntimeError: "),
        ({"module": "teacher"}, "NotImplementedError: "),
        ({"test": DataLoader(Corrupt(*labelled().dataset.tensors), 8)}, "OSError: truncated"),
    ],
)
def test_a_probe_that_cannot_run_warns_once_and_training_continues(options, message):
    watch = probe(**options)
    with pytest.warns(
        UserWarning, match=f"knn/top1 has no value in epoch 0, and training continues: {message}"
    ) as given:
        run = fit(seeded(), watch)
    assert len([w for w in given if "knn/top1" in str(w.message)]) == 1
    assert run.global_step == 12
    assert watch.history == []
    assert watch.receipt is None


def test_features_that_are_not_finite_cause_a_warning():
    class Break(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.teacher["backbone"][0].weight.data.fill_(math.nan)

    watch = probe()
    with pytest.warns(UserWarning, match="in epoch 1.* 48 of 48 features of the voters contain NaN or inf"):
        fit(seeded(), watch, Break())
    assert [row["epoch"] for row in watch.history] == [0]


def test_the_class_tokens_of_a_backbone_with_patch_tokens_are_probed():
    found = []
    for backbone in (TinyViT, TinyTokens):
        torch.manual_seed(0)
        head = DINOProjectionHead(16, 8, 4, 16, batch_norm=False)
        watch, module = probe(), DINO(backbone(), head, DINOLoss(16), lambda x: [x, x.flip(-1)], warmup_epochs=0)
        fit(module, watch, max_epochs=1)
        found.append([row["top1"] for row in watch.history])
    assert found[0] == found[1]
    assert 0.4 < found[1][0] < 1


def test_a_module_that_does_not_pool_causes_a_warning():
    with pytest.warns(UserWarning, match=r"features must be \(B, D\), but the module returns \(10, 4, 6, 6\)"):
        fit(seeded(), probe(module="teacher.backbone.0"))


def test_features_are_taken_under_the_trainers_precision():
    class Kind(nn.Module):
        def forward(self, images):
            kinds.append(torch.is_autocast_enabled("cpu"))
            return images.flatten(1)

    kinds = []
    module = seeded()
    module.probed = Kind()
    watch = probe(module="probed")
    fit(module, watch, max_epochs=1, precision="bf16-mixed")
    assert set(kinds) == {True}
    assert len(watch.history) == 1


def test_the_lightning_module_itself_and_any_submodule_can_be_probed():
    for name in ("", "student.backbone"):
        watch = probe(module=name)
        fit(seeded(), watch, max_epochs=1)
        assert len(watch.history) == 1
    with pytest.raises(MisconfigurationException, match=r"TinyDINO has no submodule 'teacher\.bone'"):
        fit(seeded(), probe(module="teacher.bone"))


# Data


class Datamodule(LightningDataModule):
    def train_dataloader(self):
        return labelled(batch_size=4)

    def test_dataloader(self):
        return labelled(20, seed=4)


class WithVal(Datamodule):
    def val_dataloader(self):
        return labelled(20, seed=5)


class Own(Datamodule):
    def knn_dataloaders(self):
        return labelled(30, seed=6), labelled(20, seed=7)


class Several(Datamodule):
    """Validation loaders in a form that a Trainer accepts; the first is labelled(20, seed=5)."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def val_dataloader(self):
        return self.form([labelled(20, seed=5), labelled(20, seed=8)])


FORMS = {
    "list": list,
    "dict": lambda loaders: dict(zip("ba", loaders, strict=True)),
    "CombinedLoader": lambda loaders: CombinedLoader(loaders, "sequential"),
}


@pytest.mark.filterwarnings("ignore:You defined a `val_dataloader`", "ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_of_several_validation_loaders_the_first_is_probed(form):
    for watch in (KNNProbeCallback(k=5), probe(test=form([labelled(20, seed=5), labelled(20, seed=8)]))):
        module = seeded()
        trainer(watch, max_epochs=1).fit(module, Several(form))
        assert watch.history[0]["top1"] == pytest.approx(accuracy(module, labelled(), labelled(20, seed=5)))


def test_all_samples_of_a_resumable_loader_vote():
    """Its order skips the batches on which the Trainer has trained."""

    class Resumable(Datamodule):
        def train_dataloader(self):
            return ResumableLoader(labelled().dataset, 4, self.trainer)

    watch, module = KNNProbeCallback(k=5), seeded()
    trainer(watch, max_epochs=2, limit_train_batches=5).fit(module, Resumable())
    assert watch.history[-1]["top1"] == pytest.approx(accuracy(module, labelled(), labelled(20, seed=4)))


@pytest.mark.filterwarnings("ignore:You defined a `val_dataloader`", "ignore:You passed in a `val_dataloader`")
def test_a_run_resumed_between_validation_and_the_end_of_the_epoch_probes_once(tmp_path):
    class Validated(TinyDINO):
        def validation_step(self, batch, batch_idx):
            pass

    def run(watch, **options):
        module = seeded()
        module.__class__ = Validated
        save = ModelCheckpoint(tmp_path, filename="validated", save_on_train_epoch_end=False)
        trainer(watch, save, max_epochs=1, enable_checkpointing=True).fit(module, WithVal(), **options)
        return watch.history

    whole = run(KNNProbeCallback(k=5))
    assert len(whole) == 1
    assert run(KNNProbeCallback(k=5), ckpt_path=tmp_path / "validated.ckpt") == whole


def test_the_probe_keeps_its_loaders_when_the_trainer_reloads():
    created = []

    class Reloaded(Datamodule):
        def test_dataloader(self):
            created.append(1)
            return super().test_dataloader()

    watch = KNNProbeCallback(k=5)
    trainer(watch, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(seeded(), Reloaded())
    assert len(created) == 1
    assert len(watch.history) == 3


@pytest.mark.filterwarnings("ignore:You defined a `val_dataloader`", "ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize(("data", "train", "test"), [(Datamodule, 3, 4), (WithVal, 3, 5), (Own, 6, 7)])
def test_the_datamodules_loaders(data, train, test):
    watch, module = KNNProbeCallback(k=5), seeded()
    trainer(watch, max_epochs=1).fit(module, data())
    loaders = labelled(30 if data is Own else 48, seed=train), labelled(20, seed=test)
    assert watch.history[0]["top1"] == pytest.approx(accuracy(module, *loaders))


def test_without_data_training_does_not_start():
    with pytest.raises(MisconfigurationException, match=re.escape("pass two loaders of batches (inputs, labels)")):
        fit(seeded(), KNNProbeCallback())
    with pytest.raises(MisconfigurationException, match="has no knn_dataloaders and no test_dataloader"):
        fit(seeded(), KNNProbeCallback(labelled()))


class Counting(TensorDataset):
    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.taken = []

    def __getitem__(self, index):
        self.taken.append(index)
        return super().__getitem__(index)


def test_of_more_samples_whole_batches_are_taken_evenly():
    data = Counting(*labelled(100).dataset.tensors)
    fit(seeded(), probe(DataLoader(data, batch_size=10), max_samples=35), max_epochs=1)
    assert data.taken == [*range(10), *range(40, 50), *range(90, 100)]


def test_of_a_stream_the_first_batches_are_taken():
    batches = list(labelled(100, batch_size=10))
    watch, module = probe(DataLoader(Stream(batches), batch_size=None), max_samples=30), seeded()
    fit(module, watch, max_epochs=1)
    first = DataLoader(TensorDataset(*(tensor[:30] for tensor in labelled(100).dataset.tensors)))
    assert watch.history[0]["top1"] == pytest.approx(accuracy(module, first, labelled(20, seed=4)))


class Endless(torch.utils.data.Sampler):
    def __iter__(self):
        while True:
            yield from range(100)


@pytest.mark.parametrize("kind", ["stream", "endless sampler"])
def test_endless_data_are_taken_up_to_the_maximum(kind):
    data = labelled(100).dataset
    if kind == "stream":
        loader = DataLoader(Stream(data[index % 100] for index in itertools.count()), batch_size=10)
    else:
        loader = DataLoader(data, batch_size=10, sampler=Endless())
    module, watch = seeded(), probe(loader, max_samples=30)
    fit(module, watch, max_epochs=1)
    first = DataLoader(TensorDataset(*(tensor[:30] for tensor in data.tensors)))
    assert watch.history[0]["top1"] == pytest.approx(accuracy(module, first, labelled(20, seed=4)))


class Doubling(DataLoader):
    def __iter__(self):
        return ((100 * images, labels) for images, labels in super().__iter__())


def test_loaders_with_an_iterator_of_their_own_are_iterated():
    data, module = labelled().dataset, seeded()
    watch = probe(Doubling(data, batch_size=10))
    fit(module, watch, max_epochs=1)
    scaled = DataLoader(TensorDataset(100 * data.tensors[0], data.tensors[1]))
    assert watch.history[0]["top1"] == pytest.approx(accuracy(module, scaled, labelled(20, seed=4)))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_inputs_have_the_type_of_the_weights(precision):
    watch = probe()
    fit(seeded(), watch, max_epochs=1, precision=precision)
    assert len(watch.history) == 1


class WithLoaders(TinyDINO):
    def knn_dataloaders(self):
        return labelled(), labelled(20, seed=4)


def test_the_lightning_modules_loaders():
    module, watch = seeded(), KNNProbeCallback(k=5)
    module.__class__ = WithLoaders
    fit(module, watch, max_epochs=1)
    assert watch.history[0]["top1"] == pytest.approx(accuracy(module, labelled(), labelled(20, seed=4)))


def test_workers_and_collate_functions_are_kept():
    def collate(samples):
        images, labels = torch.utils.data.default_collate(samples)
        return 100 * images, labels

    module, watch = seeded(), probe(labelled(collate_fn=collate, num_workers=1))
    fit(module, watch, max_epochs=1)
    scaled = DataLoader(TensorDataset(100 * labelled().dataset.tensors[0], labelled().dataset.tensors[1]))
    assert watch.history[0]["top1"] == pytest.approx(accuracy(module, scaled, labelled(20, seed=4)))


def test_groups_come_with_the_batches():
    """Every test image is among the voters; with groups it does not vote for itself."""
    images, labels = labelled().dataset.tensors
    labels = torch.randint(3, labels.shape, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(48) // 2
    plain, grouped = TensorDataset(images, labels), TensorDataset(images, labels, groups)
    found = []
    for data in (plain, grouped):
        watch = probe(DataLoader(data, batch_size=9), DataLoader(data, batch_size=9), k=1)
        fit(seeded(), watch, max_epochs=1)
        found.append(watch.history[0]["top1"])
    assert found[0] == 1
    assert found[1] < 0.7


# Resumed runs, and two processes


def test_a_resumed_run_continues_its_history(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = probe()
    fit(seeded(), *rules(), whole, save, enable_checkpointing=True)
    resumed = probe()
    trainer(*rules(), resumed).fit(seeded(), view_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.history == whole.history
    assert resumed.receipt.startswith(f"knn/top1 {whole.history[-1]['top1']:.4f} in epoch 2, the best")
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    assert saved["callbacks"]["KNNProbeCallback"]["receipt"] == whole.receipt


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"temperature": 0}, {"every_n_epochs": 0}, {"max_samples": 0}, {"temperature": "warm"}]
)
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match="must be"):
        KNNProbeCallback(**options)


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path):
    one = distributed_fits.watched(tmp_path)
    first, second = run_in_processes(distributed_fits.watched, tmp_path)
    assert second["unlabelled warnings"] == [0]  # the first process warns alone
    for rank in (first, {**second, "unlabelled warnings": [1]}):
        assert rank.keys() == one.keys()
        for name in one:
            assert rank[name] == pytest.approx(one[name], rel=1e-3), name
    reports = {file.parent.name for file in tmp_path.glob("*/report.html")}
    kinds = distributed_fits.REPORTED if distributed_fits.CAN_SHARD else ["plain"]
    assert reports == {f"{kind}-{processes}" for kind in kinds for processes in (1, 2)}
