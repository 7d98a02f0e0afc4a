import numpy as np
import pytest
import torch
from helpers.scans import write_scan

from dino_head.vision import read_volume
from dino_head.vision.volume_views import VolumeViews

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_views_have_two_sizes_and_depend_on_torchs_random_state():
    volumes = torch.rand(3, 1, 24, 24, 24)
    views = VolumeViews()
    torch.manual_seed(0)
    one = views(volumes)
    assert [tuple(view.shape) for view in one] == [(3, 1, 24, 24, 24)] * 2 + [(3, 1, 12, 12, 12)] * 4
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one, views(volumes), strict=True))
    assert not torch.equal(one[0], views(volumes)[0])
    same = views(volumes[:1].expand(4, -1, -1, -1, -1))[0]
    assert len(same.flatten(1).unique(dim=0)) == 4  # each sample has its own draw
    assert type(one[0]) is torch.Tensor


@pytest.mark.parametrize(("local", "scale"), [(False, (0.75, 1.0)), (True, (0.4, 0.75))])
def test_the_side_of_a_crop(local, scale):
    """Measured on ramps, as the difference between the largest and the smallest value of a view."""
    views = VolumeViews()
    views.appearance.transforms = ()
    ramps = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 24)] * 3, indexing="ij"))[None]
    torch.manual_seed(0)
    view = [views(ramps)[-1 if local else 0][0] for _ in range(60)]
    sides = torch.stack([v.amax(dim=(1, 2, 3)) - v.amin(dim=(1, 2, 3)) for v in view])
    assert scale[0] - 0.06 < sides.min() < scale[0] + 0.06
    assert scale[1] - 0.08 < sides.max() <= scale[1]


@pytest.mark.parametrize("share", [0, 0.001, 0.015])
def test_views_of_sparse_volumes_stay_near_0_and_1(share, tmp_path):
    values = np.full(24**3, -1000.0)
    values[np.random.default_rng(0).permutation(24**3)[: round(share * 24**3)]] = 655
    volume = read_volume(write_scan(tmp_path / "a.nii", values.reshape(24, 24, 24)), 24)
    torch.manual_seed(0)
    views = torch.cat([view.flatten() for view in VolumeViews()(volume.expand(16, -1, -1, -1, -1))])
    assert views.isfinite().all()
    assert -0.5 < views.min() < views.max() < 1.8  # noise of 0.05, a shift of 0.1 and a factor of 1.3 at most
    assert views.max() > 0.8 or share == 0
