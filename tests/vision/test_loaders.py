import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from helpers.pictures import BAD

from dino_head.vision import ResumableLoader
from dino_head.vision.files import BadFiles, ReplaceUnreadable
from dino_head.vision.images import Images, open_images


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
