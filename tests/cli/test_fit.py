import json
import shutil
import signal

import pytest
import torch
import yaml
from helpers.photos import TINY_VIT, make_photos
from helpers.states import comparable
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dino_head.callbacks import KNNProbeCallback
from dino_head.cli import main
from dino_head.cli.fit import FitCLI, fit, with_recipe
from dino_head.cli.flags import FLAGS, recipes
from dino_head.cli.run_folder import AtomicCheckpointIO, open_run
from dino_head.examples.dino_module import DINO

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*fork.*", "ignore:.*logging interval"
)


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C as before: after an interrupt, Lightning leaves a handler that ignores it."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of photos and the folder of a run, with spaces and an umlaut, and an empty working folder."""
    root = tmp_path_factory.mktemp("place")
    (root / "empty").mkdir()
    make_photos(root / "meine Fotos: größer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.chdir(root / "empty")
        yield root


def command(place, out):
    return ["--config", "images", "--data", str(place / "meine Fotos: größer"), "--out", str(out), *THREE_EPOCHS]


THREE_EPOCHS = ["--epochs", "3", "--batch-size", "16", *TINY_VIT]


@pytest.fixture(scope="module")
def run(place):
    out = place / "ein Lauf ü"
    main(["fit", *command(place, out)])
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def saved(file):
    return torch.load(file, weights_only=True)


def error_of(arguments, capsys):
    """The one line with which a wrong command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        FitCLI(arguments)
    assert end.value.code == 2
    *others, line = capsys.readouterr().err.splitlines()
    assert all(other.startswith("Seed set") for other in others)
    assert line.startswith("dino-head fit: error: ")
    return line.removeprefix("dino-head fit: error: ")


def test_all_files_of_a_run_lie_in_its_folder(run, place):
    assert [*(place / "empty").iterdir()] == []
    assert {path.name for path in place.iterdir()} == {"empty", "meine Fotos: größer", "ein Lauf ü"}
    assert {path.relative_to(run).as_posix() for path in contents(run)} == {
        "config.yaml", "data.txt", "bad_files.txt", "summary.json", "checkpoints/epoch=2.ckpt",
        "metrics/version_0/metrics.csv",
    }  # fmt: skip


def test_the_summary_holds_the_results(run):
    summary = json.loads((run / "summary.json").read_text())
    assert {"epochs", "seconds", "data", "bad_files", "data_wait", "knn_history", "diagnoses", "receipts"} == {*summary}
    assert (summary["epochs"], summary["bad_files"]) == (3, 1)
    assert summary["data"].startswith("41 files, ")
    assert 0 < summary["data_wait"] < 1
    assert [row["epoch"] for row in summary["knn_history"]] == [0, 1, 2]
    assert summary["knn_history"][-1]["top1"] == 1.0  # light and dark
    assert summary["receipts"][0].startswith("student.head.last_layer frozen for 2 optimizer steps")


def test_the_saved_configuration_is_complete(run):
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["trainer"]["max_epochs"] == 3
    assert config["trainer"]["accumulate_grad_batches"] == 1  # a default
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert model["head"]["init_args"]["output_dim"] == model["loss"]["init_args"]["output_dim"] == 64
    assert model["augment"]["init_args"]["global_size"] == model["backbone"]["init_args"]["image_size"] == 32
    assert (data["image_size"], data["eval_size"]) == (36, 32)
    assert data["data"].endswith("meine Fotos: größer")


def test_a_folder_with_a_run_is_refused_without_resume(run, place, capsys):
    before = contents(run)
    error = error_of(command(place, run), capsys)
    assert str(run) in error
    assert "resume the run with --resume; to start another run, choose another folder with --out" in error
    assert contents(run) == before


def test_a_folder_of_other_files_is_refused(place, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("words")
    for more in ([], ["--resume"]):
        assert "already contains a run or other files" in error_of([*command(place, tmp_path), *more], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_repeated_command_with_resume_starts_and_then_resumes(run, place, copy, tmp_path):
    starts = FitCLI([*command(place, tmp_path / "new"), "--resume"])
    assert starts.checkpoint is None
    again = FitCLI([*command(place, tmp_path / "new"), "--resume"])  # as if stopped before the first checkpoint
    assert again.checkpoint is None
    resumes = FitCLI([*command(place, copy), "--resume"])
    assert resumes.checkpoint == copy / "checkpoints" / "epoch=2.ckpt"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resuming_a_complete_run_changes_none_of_its_files(copy, caplog):
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file() and "metrics" not in file.parts}
    main(["fit", "--resume", "--out", str(copy)])
    assert {file: file.read_bytes() for file in before} == before
    assert f"the run in {copy} was complete" in caplog.text


def test_a_folder_without_checkpoints_starts_anew_and_keeps_the_old_report(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "report.html").write_text("old")
    assert open_run(tmp_path, "a: 2", resume=True) is None
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "config.yaml": "a: 2",
        "report.previous.html": "old",
    }


def test_a_folder_with_checkpoints_and_no_configuration_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"without config\.yaml cannot be resumed"):
        open_run(tmp_path, "a: 1", resume=True)


def test_a_batch_larger_than_the_data_is_an_error_of_one_line(place, tmp_path, capsys):
    arguments = command(place, tmp_path / "out")
    arguments[arguments.index("--batch-size") + 1] = "1000"
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments])
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dino-head fit: error: ")
    assert "fewer than a batch of 1000" in line


def test_resume_without_a_configuration_takes_the_saved_one(copy):
    cli = FitCLI(["--resume", "--out", str(copy), "--epochs", "3"])
    assert cli.checkpoint == copy / "checkpoints" / "epoch=2.ckpt"
    assert (cli.datamodule.batch_size, cli.trainer.max_epochs) == (16, 3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # as the copy has
def test_a_resumed_run_keeps_its_list_of_bad_files(run, copy):
    assert fit(["--resume", "--out", str(copy)]).results["bad_files"] == 1
    assert (copy / "bad_files.txt").read_bytes() == (run / "bad_files.txt").read_bytes()


@pytest.mark.parametrize("with_config", [False, True])
def test_resume_with_other_settings_is_refused(with_config, place, copy, capsys):
    same = command(place, copy) if with_config else ["--out", str(copy)]
    before = contents(copy)
    error = error_of([*same, "--resume", "--epochs", "9", "--trainer.max_steps=7"], capsys)
    assert "trainer.max_epochs=3 (got 9), trainer.max_steps=-1 (got 7)" in error
    assert "drop these flags, or start another run with --out" in error
    assert contents(copy) == before


def test_resume_with_other_data_is_refused(copy, capsys):
    (copy / "data.txt").write_text("42 files, of another day")
    before = contents(copy)
    error = error_of(["--resume", "--out", str(copy)], capsys)
    assert "42 files, of another day, now 41 files, " in error
    assert "restore the files, or start another run with --out" in error
    assert contents(copy) == before


@pytest.mark.parametrize("damage", ["truncated", "another file"])
def test_resume_from_a_damaged_checkpoint_is_refused(damage, copy, capsys):
    file = copy / "checkpoints" / "epoch=2.ckpt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"<html>not found</html>")
    before = contents(copy)
    assert f"{file} is not a complete checkpoint (" in error_of(["--resume", "--out", str(copy)], capsys)
    assert contents(copy) == before


class CrashError(Exception):
    pass


def at_step(step, action, monkeypatch):
    """Act at the start of a batch."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == step:
            monkeypatch.undo()
            action()

    monkeypatch.setattr(DINO, "on_train_batch_start", on_train_batch_start, raising=False)


def crash():
    raise CrashError


@pytest.mark.parametrize("stop", [crash, lambda: signal.raise_signal(signal.SIGINT)], ids=["crash", "Ctrl-C"])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_run_bitwise(
    stop, run, place, tmp_path, monkeypatch, capsys
):
    """At step 3 of 6, the second of the second epoch; with shuffling and random augmentation."""
    out = tmp_path / "out ü"
    with monkeypatch.context() as patch:
        at_step(3, stop, patch)
        with pytest.raises((SystemExit, CrashError)):
            fit(command(place, out))
    assert not (out / "summary.json").exists()
    interrupted = out / "checkpoints" / "interrupted.ckpt"
    assert interrupted.exists() is (stop is not crash)
    if stop is not crash:
        assert f"saved {interrupted}. Resume with: dino-head fit --resume --out '{out}'" in capsys.readouterr().out
        assert saved(interrupted)["global_step"] == 4
        signal.signal(signal.SIGINT, signal.default_int_handler)
    fit(["--resume", "--out", str(out)])
    one, other = (saved(folder / "checkpoints" / "epoch=2.ckpt") for folder in (run, out))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        torch.testing.assert_close(comparable(one[name]), comparable(other[name]), rtol=0, atol=0)
    assert json.loads((out / "summary.json").read_text())["receipts"][0].startswith(
        "student.head.last_layer frozen for 2 optimizer steps"
    )


def test_a_full_disk_costs_no_checkpoint_and_the_error_names_the_remedy(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    save, calls = TorchCheckpointIO.save_checkpoint, []

    def full_at_the_second(self, checkpoint, path, storage_options=None):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full_at_the_second)
    with pytest.raises(SystemExit) as end:
        fit([*command(place, out), "--trainer.limit_train_batches=1"])
    assert "No space left on device" in str(end.value)
    assert f"Resume with: dino-head fit --resume --out {out}" in str(end.value)
    assert [file.name for file in (out / "checkpoints").iterdir()] == ["epoch=0.ckpt"]
    assert fit(["--resume", "--out", str(out)]).results["epochs"] == 3


def test_a_stream_trains_and_resumes_and_holds_no_image_out(place, tmp_path, monkeypatch):
    seen = []

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 4 and not seen[4:]:
            raise CrashError
        seen.append((self.current_epoch, batch_idx, batch[0].float().mean().item()))

    whole = fit([*command(place, tmp_path / "whole"), "--stream", "2"])
    assert whole.results["data"].startswith("a stream from ")
    assert whole.results["epochs"] == 3
    assert whole.trainer.global_step == 6
    assert not any(isinstance(callback, KNNProbeCallback) for callback in whole.trainer.callbacks)
    monkeypatch.setattr(DINO, "on_train_batch_start", on_train_batch_start, raising=False)
    with pytest.raises(CrashError):
        fit([*command(place, tmp_path / "out"), "--stream", "2"])
    seen.append("crashed")
    resumed = fit(["--resume", "--out", str(tmp_path / "out"), "--stream", "2", "--global-size", "32"])
    assert [batch[:2] for batch in seen[:4] + seen[5:]] == [(epoch, index) for epoch in range(3) for index in range(2)]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_list_of_bad_files_starts_with_the_run(place, tmp_path):
    cli = FitCLI([*command(place, tmp_path), "--trainer.max_steps=1"])
    (tmp_path / "bad_files.txt").write_text("of another run\tand its reason\n")
    cli.trainer.fit(cli.model, cli.datamodule)
    assert "of another run" not in cli.datamodule.bad_files.names()


def test_folders_that_are_no_classes_have_no_probe(place, tmp_path):
    photos = make_photos(tmp_path / "photos", classes=["all"])
    cli = FitCLI(["--config", "images", "--data", str(photos), "--out", str(tmp_path / "out"), *THREE_EPOCHS])
    assert not any(isinstance(callback, KNNProbeCallback) for callback in cli.trainer.callbacks)


def test_a_backbone_that_cannot_take_local_views_raises_before_the_first_step(place, tmp_path, monkeypatch):
    monkeypatch.setattr(DINO, "training_step", lambda *args: pytest.fail("a step"))
    cli = FitCLI(command(place, tmp_path / "out"))
    cli.model.student["backbone"].options = {}
    with pytest.raises(ValueError, match="cannot take views of 16 x 16"):
        cli.trainer.fit(cli.model, cli.datamodule)


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "argument --config: required"),
    (["--config", "nothing"], f"argument --config: nothing is neither a file nor a recipe ({', '.join(recipes())})"),
    (["--config", "digits", "--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
    (["--config", "digits", "--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    (["--config", "digits", "--seed", "-1"], "argument --seed: must be at least 0, got -1"),
    (["--config", "digits", "--learning-rate", "0"], "argument --learning-rate: must be above 0, got 0"),
    (["--config", "digits", "--size", "huge"], "argument --size: must be one of tiny, small, base, large, got huge"),
    (["--config", "digits", "--size", "tiny"], "argument --size tiny: .*'size' is not accepted"),
    (["--config", "images", "--data", "x", "--local-size", "17"], "argument --local-size: must be a multiple of 16"),
    (["--config", "images", "--size", "tiny"], "argument --data: required"),
    (["--config", "images", "--data", "ni\udcf1o"], "argument --data: must be UTF-8 to be saved in config.yaml"),
    (["--config", "digits", "--out", "ni\udcf1o"], "argument --out: must be UTF-8 to be saved in config.yaml"),
    (["--config", "digits", "--precision", "fine"], "argument --precision fine: .*trainer.precision"),
    (["--config", "digits", "--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--config", "digits", "--trainer.epochs=3"], "unrecognized arguments: --trainer.epochs=3"),
    (["--config", "digits", "--trainer.max_epochs=x"], '"trainer.max_epochs": .*int'),
    (["--resume"], "argument --resume: needs --out DIR"),
    (["--resume", "--out", "nowhere"], "argument --resume: nowhere contains no run: start it with --config"),
])  # fmt: skip
def test_a_wrong_flag_is_an_error_of_one_line_that_names_it(arguments, message, place, capsys):
    line = error_of(arguments, capsys)
    before, *after = message.split(".*")
    assert before in line
    assert all(part in line for part in after)
    assert [*(place / "empty").iterdir()] == []


def test_help_lists_the_flags_and_the_recipes(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    printed = capsys.readouterr().out
    assert all(f"--{flag.name} {flag.metavar}" in printed for flag in FLAGS)
    assert all(name in printed for name in recipes())
    assert "--trainer.max_steps 100" in printed


def test_each_flag_sets_its_values(place, tmp_path):
    flags = ["--size", "base", "--learning-rate", "1e-3", "--seed", "7", "--precision", "bf16-mixed", "--devices", "1"]
    data = ["--data", str(place / "meine Fotos: größer"), "--local-size", "48", "--workers", "3"]
    cli = FitCLI(["--config", "images", "--out", str(tmp_path / "out"), *flags, *data, "--model.backbone.depth=1"])
    model = cli.config.model.init_args
    assert (model.backbone.init_args.size, model.head.init_args.input_dim) == ("base", 768)
    assert (model.learning_rate, model.augment.init_args.local_size) == (1e-3, 48)
    assert (cli.config.seed_everything, model.seed, cli.config.data.init_args.seed) == (7, 7, 7)
    assert (cli.config.trainer.precision, cli.config.trainer.devices) == ("bf16-mixed", 1)
    assert cli.datamodule.workers == 3


def test_the_default_folder_is_named_after_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(FitCLI(["--config", "digits"]).out) == "runs/digits"


def test_a_script_that_resumes_leaves_the_saved_configuration_as_it_is(run, tmp_path):
    def rule(flags):
        return ["--learning-rate", "1"]

    out = ["--out", str(tmp_path)]
    assert with_recipe("images", [*out, "--resume"], rule)[:4] == ["--config", "images", "--learning-rate", "1"]
    assert with_recipe("images", ["--out", str(run), "--resume"], rule) == ["--out", str(run)] * 2 + ["--resume"]


def test_a_checkpoint_is_complete_or_not_there(tmp_path, monkeypatch):
    """Written in place, it would be incomplete for a while."""
    file = tmp_path / "a" / "one.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, file)
    before, place = file.read_bytes(), file.stat().st_ino
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, file)
    assert file.stat().st_ino != place  # a new file in the place of the old one

    def half(self, checkpoint, path, storage_options=None):
        path.write_bytes(before[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", half)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, file)
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [("one.ckpt", before)]
