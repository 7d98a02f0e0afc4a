"""DINOv2 in two processes that mask unequal numbers of patches, also none."""

import pytest
import torch
from helpers import distributed_dinov2
from helpers.processes import run_in_processes

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_in_processes(distributed_dinov2.unequal, tmp_path_factory.mktemp("unequal"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return distributed_dinov2.unequal(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("case", distributed_dinov2.CASES)
def test_two_processes_with_unequal_numbers_of_patches_equal_one(two, one, case):
    first, second = (rank[case] for rank in two)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    torch.testing.assert_close(first["state"], one[case]["state"], rtol=1e-4, atol=1e-5)
    assert first["receipts"] == second["receipts"]


@pytest.mark.parametrize("case", ["center", "shared head", "accumulated"])
def test_the_receipts_of_the_processes_name_both_centers(two, case):
    freeze, teacher, *_ = two[0][case]["receipts"]
    assert freeze.count("bitwise unchanged on 2 of 2 ranks") == (1 if case == "shared head" else 2)
    # Checked at the steps 1, 2, 3 and the last of each epoch; no patch is masked at step 3 unless it has two batches.
    looks = 5 if case == "center" or case == "shared head" else 6
    assert f"loss.center at 6 of 6, patch_loss.center at {looks} of {looks}, on 2 of 2 ranks" in teacher


@pytest.mark.parametrize("case", ["center", "sinkhorn"])
def test_the_measurements_of_two_processes_equal_those_of_one(two, one, case):
    histories = [two[0][case]["history"], two[1][case]["history"], one[case]["history"]]
    assert [len(history) for history in histories] == [24] * 3
    for first, second, whole in zip(*histories, strict=True):
        assert first == second
        assert first.keys() == whole.keys()
        assert first == pytest.approx(whole, rel=1e-3, abs=1e-4)
    without = [index for index, row in enumerate(histories[0]) if "ibot/loss" not in row]
    assert without == [2, 10, 18]  # the batches in which neither process has a masked patch


def test_a_resumed_run_of_two_processes_equals_an_uninterrupted_one_bitwise(tmp_path):
    for uninterrupted, resumed in run_in_processes(distributed_dinov2.resumed, tmp_path):
        torch.testing.assert_close(uninterrupted, resumed, rtol=0, atol=0)


def test_a_nan_in_one_patch_of_one_process_stops_both_before_any_update(tmp_path):
    for rank in run_in_processes(distributed_dinov2.nan_on_one, tmp_path):
        assert rank["error"].startswith("the loss of patch_loss (IBOTPatchLoss) is nan in epoch 0, at optimizer step 2")
        torch.testing.assert_close(rank["after"], rank["before"], rtol=0, atol=0)
