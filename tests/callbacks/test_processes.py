"""Two processes equal one, their ranks are identical, and killed runs resume: on the example and its factored path."""

import pytest
import torch
from helpers import distributed_fits
from helpers.processes import run_in_processes
from torch.multiprocessing import ProcessExitedException

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_in_processes(distributed_fits.half_each, tmp_path_factory.mktemp("half-each"))


@pytest.fixture(scope="module")
def one():
    """The state after training in one process, without and with accumulation, of `two` in two."""
    return [distributed_fits.fit_rules(distributed_fits.seeded(), accumulate_grad_batches=n)["state"] for n in (1, 2)]


needs_shards = pytest.mark.skipif(not distributed_fits.CAN_SHARD, reason="fully_shard of this torch needs a GPU")
PLAIN = [
    *("ddp", "find_unused_parameters", "static_graph", "gradient_as_bucket_view"),
    pytest.param("fully_shard", marks=needs_shards),
]
ACCUMULATED = ["accumulated", pytest.param("accumulated, sharded", marks=needs_shards)]


@pytest.mark.parametrize("strategy", [*PLAIN, *ACCUMULATED])
def test_the_ranks_are_identical(two, strategy):
    first, second = (rank[strategy] for rank in two)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["receipts"] == second["receipts"]
    freeze, teacher, schedule = first["receipts"]
    steps = 6 if strategy.startswith("accumulated") else 12
    assert f"frozen for {steps} optimizer steps, bitwise unchanged on 2 of 2 ranks" in freeze
    assert teacher.startswith("teacher seen to change at 6 of 6 looks, loss.center at 6 of 6")
    assert f"on 2 of 2 ranks, in {3 * steps} of {3 * steps} optimizer steps" in teacher
    assert schedule.endswith(f"in {3 * steps} of {3 * steps} optimizer steps")


@pytest.mark.parametrize("strategy", PLAIN)
def test_two_processes_with_half_a_batch_equal_one_with_the_whole(two, one, strategy):
    torch.testing.assert_close(two[0][strategy]["state"], one[0], rtol=1e-4, atol=1e-5)
    start = distributed_fits.seeded().state_dict()
    assert not torch.equal(start["teacher.head.last_layer.weight_v"], one[0]["teacher.head.last_layer.weight_v"])


@pytest.mark.parametrize("strategy", ACCUMULATED)
def test_two_processes_under_accumulation_equal_one(two, one, strategy):
    torch.testing.assert_close(two[0][strategy]["state"], one[1], rtol=1e-4, atol=1e-5)


def test_manual_accumulation_in_two_processes_equals_one(tmp_path):
    ranks = run_in_processes(distributed_fits.manual, tmp_path)
    one = distributed_fits.manual(tmp_path)
    assert [rank["steps"] for rank in ranks] == [one["steps"]] * 2 == [18] * 2
    for rank in ranks:
        torch.testing.assert_close(rank["state"], one["state"], rtol=1e-4, atol=1e-5)


def test_shards_that_hide_or_gather_parameters_are_refused(tmp_path):
    for errors in run_in_processes(distributed_fits.refusals, tmp_path):
        assert "student.head._fsdp_wrapped_module.last_layer" in errors["flat"]
        assert "no trainable parameter after the strategy's set-up" in errors["flat"]
        assert "use_orig_params=True" in errors["flat"]
        if distributed_fits.CAN_SHARD:
            assert "is sharded in another way" in errors["gathered teacher"]
            assert "reshard_after_forward=True" in errors["gathered teacher"]
        assert "is sharded in another way in the teacher than in the student" in errors["teacher not sharded"]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_the_middle_of_an_epoch_and_resumed_equals_uninterrupted_bitwise(processes, tmp_path):
    """kill -9 of the last process, in the 6th step of the second epoch; in new processes each time."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = run_in_processes(distributed_fits.uninterrupted, tmp_path / "whole", processes)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_in_processes(distributed_fits.killed, tmp_path / "killed", processes)
    assert (tmp_path / "killed" / "checkpoints" / "step=17.ckpt").exists()
    assert not (tmp_path / "killed" / "checkpoints" / "step=18.ckpt").exists()
    resumed = run_in_processes(distributed_fits.resumed, tmp_path / "killed", processes)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


@pytest.mark.parametrize("optimization", ["automatic", "accumulated", "raw"])
def test_a_nan_in_one_process_stops_both_before_any_update(optimization, nan):
    first, second = (rank[optimization] for rank in nan)
    for rank in (first, second):
        assert rank["error"].startswith("the loss is nan in epoch 0")
        torch.testing.assert_close(rank["after"], rank["before"], rtol=0, atol=0)
    torch.testing.assert_close(first["after"], second["after"], rtol=0, atol=0)


def test_the_receipt_counts_the_processes_in_which_the_teacher_changed(nan):
    for rank in nan:
        assert rank["receipt"].startswith("teacher seen to change at 0 of ")
        assert "on 1 of 2 ranks" in rank["receipt"]


@pytest.fixture(scope="module")
def nan(tmp_path_factory):
    return run_in_processes(distributed_fits.nan_on_one, tmp_path_factory.mktemp("nan"))


def test_a_process_that_skips_the_loss_in_a_batch_does_not_stop_the_others(tmp_path):
    first, second = run_in_processes(distributed_fits.loss_skipped_on_one, tmp_path)
    assert first == second
    for receipt in first:
        assert receipt.startswith("teacher seen to change at 4 of 4 looks")
        assert "on 2 of 2 ranks" in receipt
