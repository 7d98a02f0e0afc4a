from types import SimpleNamespace

import pytest
import torch
from helpers.toy_training import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, Dataset

from dino_head.vision.data_wait import DataWait


@pytest.fixture
def clock(monkeypatch):
    """A clock that samples and steps advance."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("dino_head.vision.data_wait.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Slow(Dataset):
    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.clock.now += self.seconds
        return torch.randn(32)


class Busy(BoringModel):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 1.0
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("seconds", "share"), [(3.0, 0.75), (0.0, 0.0)])
def test_the_share_of_time_that_training_waits_for_data(clock, seconds, share):
    wait = DataWait()
    run = trainer(wait, max_epochs=2)
    run.fit(Busy(clock), DataLoader(Slow(clock, seconds)))
    assert wait.share == pytest.approx(share, abs=0.05)  # Lightning prefetches a batch
    assert run.callback_metrics["data_wait"].item() == pytest.approx(wait.share)


def test_an_epoch_that_a_resumed_run_continues_is_measured(clock, tmp_path):
    """Lightning does not call on_train_epoch_start there."""
    wait = DataWait()
    checkpoint = ModelCheckpoint(tmp_path, filename="inside", every_n_train_steps=2)
    trainer(checkpoint, max_epochs=1, limit_train_batches=3, enable_checkpointing=True).fit(
        Busy(clock), DataLoader(Slow(clock, 0.0))
    )
    run = trainer(wait, max_epochs=1, limit_train_batches=3)
    run.fit(Busy(clock), DataLoader(Slow(clock, 1.0)), ckpt_path=tmp_path / "inside.ckpt")
    assert run.global_step == 3
    assert 0 < wait.share < 1
