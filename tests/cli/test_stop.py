"""Signals and time limits, in tiny runs."""

import os
import shutil
import signal

import pytest
import torch
from helpers.processes import START_METHOD, run_in_processes
from helpers.stopped_runs import (
    Data,
    Model,
    arguments,
    batches,
    result,
    run,
    run_and_signal_group,
    run_stop_and_resume,
    send,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import multiprocessing

from dino_head.cli.fit import FitCLI
from dino_head.cli.run_folder import open_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling"),
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signals"),
]
PLAIN, ACCUMULATED = [], ["--trainer.accumulate_grad_batches=3"]
MAX_STEPS, ONE_BATCH = ["--trainer.max_steps=10"], ["--trainer.limit_train_batches=1"]
RELOADED, OVERFIT = ["--trainer.reload_dataloaders_every_n_epochs=2"], ["--trainer.overfit_batches=2"]
VALIDATED = ["--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=2", "--trainer.num_sanity_val_steps=0"]


@pytest.fixture(autouse=True)
def no_actions():
    yield
    Model.actions.clear()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Events and result of the run without a stop, once for each kind."""
    runs = {}

    def get(options):
        key = " ".join(options)
        if key not in runs:
            Model.events.clear()
            out = tmp_path_factory.mktemp("whole") / "run"
            run(out, *options)
            runs[key] = [*Model.events], result(out)
        return runs[key]

    return get


def stop(out, event, action, *options):
    """The exit code of a run that acts at an event."""
    Model.events.clear()
    Model.actions[event] = action
    with pytest.raises(SystemExit) as end:
        run(out, *options)
    Model.actions.clear()
    return end.value.code


@pytest.mark.parametrize(("options", "event", "name", "code", "saved"), [
    (PLAIN, ("step", 0), "SIGTERM", 143, 1),  # the first batch
    (PLAIN, ("step", 5), "SIGUSR1", 138, 6),  # inside an epoch
    (PLAIN, ("step", 5), "SIGINT", 130, 6),
    (PLAIN, ("step", 5), "SIGUSR2", 140, 6),
    (PLAIN, ("step", 7), "SIGTERM", 143, 8),  # the last of an epoch
    (PLAIN, ("end", 1), "SIGTERM", 143, 8),  # at the end of an epoch
    (ACCUMULATED, ("step", 4), "SIGTERM", 143, 7),  # the first of a window of three
    (ACCUMULATED, ("step", 6), "SIGTERM", 143, 7),  # its last
    (ACCUMULATED, ("step", 7), "SIGTERM", 143, 8),  # a window of one, at the end of an epoch
    (MAX_STEPS, ("step", 7), "SIGTERM", 143, 9),  # Lightning cannot resume from the end of this epoch
    (ONE_BATCH, ("step", 0), "SIGTERM", 143, 1),
    (RELOADED, ("step", 5), "SIGTERM", 143, 6),
    (OVERFIT, ("step", 2), "SIGTERM", 143, 3),
    (VALIDATED, ("step", 5), "SIGTERM", 143, 6),  # before a validation
    (VALIDATED, ("validation", 1), "SIGTERM", 143, 6),  # in it
    (VALIDATED, ("step", 7), "SIGTERM", 143, 8),  # before a validation and the end of an epoch
])  # fmt: skip
def test_a_run_stopped_by_a_signal_and_resumed_equals_the_uninterrupted_run_bitwise(
    options, event, name, code, saved, uninterrupted, tmp_path, capsys
):
    events, whole = uninterrupted(options)
    out, handlers = tmp_path / "run", {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert stop(out, event, send(name), *options) == code
    file = out / "checkpoints" / "interrupted.ckpt"
    assert (
        f"stopped by {name} and saved {file}. Resume with: dino-head fit --resume --out {out}"
        in capsys.readouterr().out
    )
    assert not (out / "summary.json").exists()
    assert batches(out) == saved
    run(out, *options, "--resume")
    assert Model.events == events
    assert result(out)[1] == whole[1]
    torch.testing.assert_close(result(out)[0], whole[0], rtol=0, atol=0)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@pytest.mark.parametrize(("options", "event"), [(PLAIN, ("step", 11)), (MAX_STEPS, ("step", 9)), (PLAIN, ("end", 2))])
def test_a_signal_in_the_last_batch_of_a_run_lets_it_complete(options, event, uninterrupted, tmp_path):
    Model.actions[event] = send("SIGTERM")
    run(tmp_path / "run", *options)
    torch.testing.assert_close(result(tmp_path / "run")[0], uninterrupted(options)[1][0], rtol=0, atol=0)
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "checkpoints" / "interrupted.ckpt").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_the_same_signal_a_second_time_stops_at_once(name, code, tmp_path, capsys):
    out = tmp_path / "run"
    assert stop(out, ("step", 5), send(name, times=2)) == code
    assert f"stopped at once, without a new checkpoint. Resume with: dino-head fit --resume --out {out}" in (
        capsys.readouterr().out
    )
    assert [file.name for file in (out / "checkpoints").iterdir()] == ["last.ckpt"]


def test_another_signal_does_not_count_as_the_second(tmp_path):
    """SLURM sends SIGTERM after SIGUSR1."""

    def both():
        send("SIGUSR1")()
        send("SIGTERM")()

    assert stop(tmp_path / "run", ("step", 5), both) == 138
    assert batches(tmp_path / "run") == 6


@pytest.mark.parametrize(("times", "files"), [(1, {"last.ckpt": 4, "interrupted.ckpt": 4}), (2, {})])
def test_a_signal_while_a_checkpoint_is_written_leaves_no_incomplete_one(times, files, tmp_path, monkeypatch):
    save, out = TorchCheckpointIO.save_checkpoint, tmp_path / "run"

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        monkeypatch.undo()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        send("SIGTERM", times)()
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", save_checkpoint)
    with pytest.raises(SystemExit) as end:
        run(out)
    assert end.value.code == 143
    assert {file.name: batches(out, file.stem) for file in (out / "checkpoints").iterdir()} == files


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_before_training_stops_at_once(name, code, tmp_path):
    validated = ["--trainer.limit_val_batches=1.0", "--trainer.num_sanity_val_steps=2"]
    assert stop(tmp_path / "run", ("sanity", 0), send(name), *validated) == code
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert run(tmp_path / "run", *validated, "--resume").results["epochs"] == 3


def test_a_sigterm_that_lightning_receives_before_training_stops_after_the_first_batch(tmp_path, monkeypatch):
    load = Data.train_dataloader

    def train_dataloader(self):
        monkeypatch.undo()
        send("SIGTERM")()
        return load(self)

    monkeypatch.setattr(Data, "train_dataloader", train_dataloader)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run")
    assert end.value.code == 143
    assert batches(tmp_path / "run") == 1


@pytest.mark.parametrize("options", [PLAIN, ACCUMULATED])
def test_a_run_in_jobs_of_limited_time_equals_the_uninterrupted_run_bitwise(options, uninterrupted, tmp_path, capsys):
    """Each job stops at its first point, as no time is left to it."""
    events, whole = uninterrupted(options)
    Model.events.clear()
    out, stops = tmp_path / "run", []
    while not (out / "summary.json").exists():
        try:
            run(out, "--max-time", "00:00:00:00", *options, "--resume")
        except SystemExit as end:
            stops.append((end.code, batches(out)))
    assert stops == [(124, batch) for batch in (range(1, 12) if options == PLAIN else (3, 4, 7, 8, 11))]
    assert "stopped after the time limit and saved" in capsys.readouterr().out
    assert Model.events == events
    assert result(out)[1] == whole[1]
    torch.testing.assert_close(result(out)[0], whole[0], rtol=0, atol=0)


def test_a_resumed_run_may_have_another_time_limit(tmp_path, caplog):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        run(out, "--max-time", "00:00:00:00")
    assert run(out, "--trainer.max_time", "{hours: 1, minutes: 30}", "--resume").results["epochs"] == 3
    assert "Ignoring" not in caplog.text  # Lightning, of a max_time beside a Timer


@pytest.mark.parametrize(("option", "message"), [
    (["--max-time", "5min"], "argument --max-time: must be DD:HH:MM:SS (days, hours, minutes, seconds), got 5min"),
    (["--trainer.max_time", "5min"], "Timer(duration='5min')` is not a valid duration"),
    (["--trainer.callbacks+=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=x"], "save after an error, in the m"),
    (["--trainer.callbacks.save_on_exception=true"], "ModelCheckpoint would save after an error, in the middle of a b"),
])  # fmt: skip
def test_options_that_would_not_resume_exactly_raise_an_error_of_one_line(option, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        FitCLI(arguments(tmp_path / "run", *option))
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job of SLURM; the file lists the calls of scontrol."""
    job = {"NTASKS": "1", "JOB_ID": "1234", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    return tmp_path / "calls"


@pytest.mark.parametrize(("name", "code", "job"), [
    ("SIGUSR1", 138, "1234"),
    ("SIGUSR1", 138, "9_7"),  # of an array
    ("SIGTERM", 143, None),
])  # fmt: skip
def test_a_slurm_job_requeues_itself_and_continues_bitwise(
    name, code, job, slurm, uninterrupted, tmp_path, monkeypatch, capsys
):
    events, whole = uninterrupted(PLAIN)
    if job == "9_7":
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    out = tmp_path / "run"
    assert stop(out, ("step", 5), send(name), "--resume") == code
    assert (slurm.read_text() if slurm.exists() else None) == (job and f"requeue {job}\n")
    assert (f"requeued SLURM job {job}" in capsys.readouterr().out) is (job is not None)
    assert [file.name for file in out.glob("hpc*")] == []
    shutil.copy(out / "checkpoints" / "last.ckpt", out / "hpc_ckpt_1.ckpt")  # an older one, which Lightning would take
    run(out, "--resume")
    assert Model.events == events
    torch.testing.assert_close(result(out)[0], whole[0], rtol=0, atol=0)


def test_without_scontrol_the_run_reports_that_it_was_not_requeued(slurm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert stop(tmp_path / "run", ("step", 5), send("SIGUSR1")) == 138
    assert "SLURM job 1234 was not requeued: " in capsys.readouterr().out


def test_the_checkpoint_with_the_most_batches_is_the_newest(tmp_path):
    def write(name, batches, modified):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        progress = {"epoch_loop.batch_progress": {"total": {"processed": batches}}}
        torch.save({"state_dict": {}, "loops": {"fit_loop": progress}}, file)
        os.utime(file, (modified, modified))
        return file

    (tmp_path / "config.yaml").write_text("a: 1")
    write("checkpoints/copied.ckpt", 3, modified=30)
    last = write("checkpoints/last.ckpt", 8, modified=10)
    assert open_run(tmp_path, "a: 1", resume=True) == last
    later = write("checkpoints/interrupted.ckpt", 8, modified=20)
    assert open_run(tmp_path, "a: 1", resume=True) == later
    slurm = write("hpc_ckpt_3.ckpt", 9, modified=5)
    assert open_run(tmp_path, "a: 1", resume=True) == slurm
    with pytest.raises(ValueError, match="resume the run with --resume"):
        open_run(tmp_path, "a: 1", resume=False)


def test_a_folder_whose_only_checkpoint_is_of_slurm_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"half")
    with pytest.raises(ValueError, match="already contains a run"):
        open_run(tmp_path, "a: 1", resume=False)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        open_run(tmp_path, "a: 1", resume=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_signal_to_all_processes_of_a_run_leaves_the_workers_alive(uninterrupted, tmp_path):
    process = multiprocessing.get_context(START_METHOD).Process(target=run_and_signal_group, args=(tmp_path / "run",))
    process.start()
    process.join()
    assert process.exitcode == 143
    assert batches(tmp_path / "run") == 6
    run(tmp_path / "run", "--data.workers=1", "--resume")
    torch.testing.assert_close(result(tmp_path / "run")[0], uninterrupted(PLAIN)[1][0], rtol=0, atol=0)


@pytest.mark.distributed
def test_two_processes_stop_together_if_one_gets_the_signal(tmp_path):
    one, other = run_in_processes(run_stop_and_resume, tmp_path)
    for codes, saved, same in (one, other):
        assert codes == {"SIGTERM": 143, "SIGUSR1": 138}
        assert saved == {"SIGTERM": 6, "SIGUSR1": 6}
        assert same


@pytest.mark.parametrize("option", ["detect_anomaly=true", "profiler=simple", "use_distributed_sampler=false"])
def test_options_that_only_watch_change_no_result(option, uninterrupted, tmp_path):
    run(tmp_path / "run", f"--trainer.{option}")
    torch.testing.assert_close(result(tmp_path / "run")[0], uninterrupted(PLAIN)[1][0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_barebones_run_trains_without_a_logger(tmp_path):
    cli = run(tmp_path / "run", "--trainer.barebones=true", "--trainer.callbacks=null", "--trainer.logger=null")
    assert (cli.trainer.global_step, cli.trainer.loggers) == (12, [])
