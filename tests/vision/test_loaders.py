import multiprocessing
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers.pictures import BAD
from helpers.processes import run_in_processes
from helpers.stopped_runs import Data, Model, overfit_batches
from helpers.toy_training import trainer
from lightning.pytorch.utilities import CombinedLoader

from dino_head.vision import ResumableLoader
from dino_head.vision.files import BadFiles, ReplaceUnreadable
from dino_head.vision.images import Images, open_images
from dino_head.vision.loaders import stop_signals_blocked
from dino_head.vision.streams import StreamLoader


def trainer_at(batch=0, world_size=1, rank=0):
    """The counters of a Trainer that a loader reads."""
    return SimpleNamespace(world_size=world_size, global_rank=rank, fit_loop=SimpleNamespace(batch_idx=batch - 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="workers are always spawned here")
def test_spawned_workers_load_what_forked_workers_load(tree, tmp_path):
    """Bitwise, with bad files among the images, which workers of both kinds find and report."""
    results = {}
    for method in ("fork", "spawn"):
        images = ReplaceUnreadable(Images(open_images(str(tree)), 16), BadFiles(tmp_path / f"{method}.txt"))
        loader = ResumableLoader(images, 2, trainer_at(), num_workers=2, multiprocessing_context=method)
        results[method] = [*loader], images.bad, images.bad_files.names()
    forked, spawned = results.values()
    assert len(forked[0]) == len(spawned[0]) == 5
    for (images, labels), (same_images, same_labels) in zip(forked[0], spawned[0], strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert torch.equal(forked[1], spawned[1])
    assert forked[2] == spawned[2]
    assert 1 <= len(spawned[2]) <= len(BAD)
    assert int(spawned[1].sum()) == len(spawned[2])


def test_a_loader_starts_at_the_current_batch():
    data = torch.arange(20)
    whole = [*ResumableLoader(data, 3, trainer_at(0))]
    rest = [*ResumableLoader(data, 3, trainer_at(2))]
    assert len(whole) == 6
    assert torch.equal(torch.stack(rest), torch.stack(whole[2:]))


def test_processes_load_disjoint_shares():
    shares = [torch.cat([*ResumableLoader(torch.arange(20), 5, trainer_at(0, 2, rank))]) for rank in range(2)]
    assert sorted(torch.cat(shares).tolist()) == [*range(20)]


def test_fewer_samples_than_a_batch_raise():
    with pytest.raises(ValueError, match=r"10 samples for each process .* a batch of 11: use a smaller batch size"):
        ResumableLoader(torch.arange(20), 11, trainer_at(0, 2))


class Trained(Model):
    validation_step = None


def trained_on(data, **options):
    """The labels of each batch of a fit."""
    Model.events.clear()
    run = trainer(limit_val_batches=0, **options)
    run.fit(Trained(), data(run))
    return [event[3] for event in Model.events if event[0] == "step"]


FIRST_TWO = [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.filterwarnings(
    "ignore:You requested to overfit but enabled train", "ignore:You passed in a `val_dataloader`"
)
@pytest.mark.parametrize("data", [
    lambda run: Data(),  # created in the hook
    lambda run: ResumableLoader(Data().labelled(), 4, run, seed=3),
], ids=["hook", "argument"])  # fmt: skip
def test_overfitting_trains_on_the_same_batches_in_each_epoch(data):
    assert trained_on(data, max_epochs=3, overfit_batches=2) == 3 * FIRST_TWO


@pytest.mark.distributed
def test_overfitting_in_two_processes_divides_the_same_batches(tmp_path):
    one, other = run_in_processes(overfit_batches, tmp_path)
    assert one == 3 * [[0, 2], [4, 6]]
    assert other == 3 * [[1, 3], [5, 7]]


class Rows(torch.utils.data.IterableDataset):
    """A stream in another order in each epoch."""

    def __init__(self):
        self.rows, self.images = self, torch.randn(16, 1, 8, 8)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return ((self.images[label], label) for label in torch.arange(16).roll(self.epoch))


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.parametrize(("options", "second"), [({"overfit_batches": 2}, 0), ({"limit_train_batches": 2}, 15)])
def test_overfitting_on_a_stream_repeats_its_first_epoch(options, second):
    epochs = trained_on(lambda run: StreamLoader(Rows(), 4, run), max_epochs=2, **options)
    assert epochs[:2] == FIRST_TWO
    assert epochs[2][0] == second


def test_a_loader_that_is_trained_on_beside_a_longer_one_starts_again_from_its_first_batch():
    """Lightning repeats the shorter loader until the longer one ends."""
    seen = []

    class Both(Trained):
        def training_step(self, batch, batch_idx):
            seen.append(batch["short"][1].tolist())
            return super().training_step(batch["long"], batch_idx)

    run = trainer(max_epochs=1, limit_val_batches=0)
    images = Data().labelled()
    short = torch.utils.data.Subset(images, range(8))
    loaders = {"short": ResumableLoader(short, 4, run), "long": ResumableLoader(images, 4, run)}
    run.fit(Both(), CombinedLoader(loaders, "max_size_cycle"))
    assert seen[2:] == seen[:2]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no such signals")
def test_signals_arrive_after_workers_have_started(monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))
    with stop_signals_blocked():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # other threads do not block it
        assert received == []
    signal.signal(signal.SIGTERM, before)
    assert received == ["SIGTERM"]
