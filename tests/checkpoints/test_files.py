"""Kinds of checkpoint files, and files without weights."""

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from dino_head import DINOProjectionHead
from dino_head.checkpoints import export_head, load_head

ROOT = Path(__file__).parents[1]


@pytest.fixture
def head():
    torch.manual_seed(0)
    return DINOProjectionHead(6, 8, 4, 12)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_safetensors(head, tmp_path):
    state = {f"teacher.head.{key}": value for key, value in export_head(head, "dino").items()}
    save_file(state | {"teacher.backbone.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert equal(load_head(tmp_path / "model.safetensors"), head)
    assert equal(load_head(str(tmp_path / "model.safetensors")), head)


def save_shards(folder, state):
    """Three files and their index, as Hugging Face's libraries write them."""
    shards = [dict(list(state.items())[first::3]) for first in range(3)]
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-00003.safetensors"
        save_file(shard, folder / name)
        places |= dict.fromkeys(shard, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_sharded_safetensors(head, tmp_path):
    assert equal(load_head(save_shards(tmp_path, export_head(head, "dino"))), head)


def rewrite(index, change):
    places = json.loads(index.read_text())
    change(places["weight_map"])
    index.write_text(json.dumps(places))


@pytest.mark.parametrize(("change", "message"), [
    (lambda index: (index.parent / "model-00002-of-00003.safetensors").unlink(),
     "names model-00002-of-00003.safetensors, which is missing: download all 3 files"),
    (lambda index: index.write_text("{}"), "no index of sharded safetensors: expected JSON with a 'weight_map'"),
    (lambda index: index.write_text('{"weight_map": [1]}'), "no index of sharded safetensors"),
    (lambda index: index.write_text('{"weight_map": '), "no index of sharded safetensors"),
    (lambda index: index.write_text('{"weight_map": {"a": 1, "b": "c"}}'), "a 'weight_map' of file names"),
    (lambda index: index.write_text('{"weight_map": {"a": 1}}'), "a 'weight_map' of file names"),
    (lambda index: index.write_text("{" * 9 + '"a":' + "[" * 100_000), "no index of sharded safetensors"),
    (lambda index: rewrite(index, lambda places: places.update({"mlp.0.weight": "a.bin"})), "names 'a.bin', expected"),
    (lambda index: rewrite(index, lambda places: places.update({"mlp.0.weight": "../x"})), "names '../x', expected"),
    (lambda index: rewrite(index, lambda places: places.update({"new": places["mlp.0.weight"]})), "disagree about new"),
    (lambda index: rewrite(index, lambda places: places.pop("mlp.0.weight")), "disagree about mlp.0.weight"),
])  # fmt: skip
def test_incomplete_shards_raise(head, tmp_path, change, message):
    index = save_shards(tmp_path, export_head(head, "dino"))
    change(index)
    with pytest.raises(ValueError, match=message):
        load_head(index)


def test_a_shard_with_tensors_that_the_index_places_elsewhere_raises(head, tmp_path):
    index = save_shards(tmp_path, export_head(head, "dino"))
    last = tmp_path / "model-00003-of-00003.safetensors"
    save_file({**load_file(last), "mlp.0.weight": torch.zeros(8, 6)}, last)  # left from another download
    with pytest.raises(ValueError, match=r"model-00003-of-00003.safetensors disagree about mlp.0.weight"):
        load_head(index)


@pytest.mark.parametrize("size", [0x3C20, 0x7B20])
def test_a_safetensors_header_of_any_length_loads(head, tmp_path, size):
    """The first eight bytes are a number, and may look like the start of a web page or of JSON."""
    state = export_head(head, "dino")
    without = int.from_bytes(save(state, metadata={"a": ""})[:8], "little")
    data = save(state, metadata={"a": "x" * (size - without)})
    assert data[:2].strip() in (b"<", b"{")
    (tmp_path / "a").write_bytes(data)
    assert equal(load_head(tmp_path / "a"), head)


def test_files_of_torch_before_1_6(head, tmp_path):
    torch.save(head.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(load_head(tmp_path / "old.pth"), head)


def test_the_options_of_the_authors_files_load(head, tmp_path):
    torch.save({"teacher": head.state_dict(), "args": argparse.Namespace(lr=0.1, rest=[1, "a"])}, tmp_path / "a.pth")
    assert equal(load_head(tmp_path / "a.pth"), head)
    with pytest.raises(pickle.UnpicklingError):  # the allow-list was this load's own
        torch.load(tmp_path / "a.pth", weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_head(tmp_path / "a.pth")
        torch.load(tmp_path / "a.pth", weights_only=True)  # and the user's is still there


def test_threads_load_at_the_same_time(head, tmp_path):
    torch.save({"teacher": head.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    with ThreadPoolExecutor(4) as pool:
        loaded = [*pool.map(lambda _: load_head(tmp_path / "a.pth"), range(40))]
    assert all(equal(one, head) for one in loaded)


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


class Mine:
    pass


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_malicious_file_raises_and_no_code_runs(head, tmp_path, is_zip):
    trace, file = tmp_path / "trace", tmp_path / "evil.pth"
    torch.save({**head.state_dict(), "evil": Evil(trace)}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        ValueError, match=r"is refused: besides tensors it contains posix.mkdir, which could run"
    ) as caught:
        load_head(file)
    assert "weights_only" not in str(caught.value)  # no advice to run it
    assert not trace.exists()
    torch.load(file, weights_only=False)  # it would have
    assert trace.exists()


def test_a_plain_pickle_raises_and_no_code_runs(tmp_path):
    file, trace = tmp_path / "evil.pkl", tmp_path / "trace"
    file.write_bytes(pickle.dumps({"state_dict": Evil(trace)}))
    with pytest.raises(ValueError, match=r"is neither safetensors nor a file of torch.save"):
        load_head(file)
    assert not trace.exists()
    pickle.loads(file.read_bytes())  # it would have
    assert trace.exists()


def test_classes_that_the_user_trusts_load(head, tmp_path):
    torch.save({"teacher": head.state_dict(), "config": Mine()}, tmp_path / "mine.ckpt")
    with pytest.raises(ValueError, match=r"it contains .*Mine, which could run code"):
        load_head(tmp_path / "mine.ckpt")
    torch.save({"teacher": head.state_dict(), "config": (Mine(), Path("a"))}, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"it contains .*(Mine.*Path|Path.*Mine), which"):
        load_head(tmp_path / "two.ckpt")
    with torch.serialization.safe_globals([Mine]):
        assert equal(load_head(tmp_path / "mine.ckpt"), head)


def test_errors_name_further_classes_that_torch_needs(head, tmp_path):
    """Allowing the classes in the first error is not always enough."""
    torch.save({"teacher": head.state_dict(), "loss": np.float64(1)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"besides tensors it contains .*scalar.*add_safe_globals"):
        load_head(tmp_path / "a.ckpt")
    with (
        torch.serialization.safe_globals([np.dtype, np.float64(1).__reduce__()[0]]),
        pytest.raises(ValueError, match=r"Float64DType|_reconstruct|can only"),
    ):
        load_head(tmp_path / "a.ckpt")


def test_endless_dictionaries_raise(head, tmp_path):
    endless = {}
    endless["again"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    for source in (endless, tmp_path / "endless.pth"):
        with pytest.raises(ValueError, match=r"nested more than 20 levels deep, or contain themselves, at again.again"):
            load_head(source)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_raise(head, tmp_path, kind, share):
    file = tmp_path / "cut"
    if kind == "safetensors":
        save_file(export_head(head, "dino"), file)
    else:
        torch.save(head.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"cut \([\d,]+ bytes\) is .*: download or copy it again"):
        load_head(file)


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights.txt", "1 2 3")


@pytest.mark.parametrize(("write", "message"), [
    (lambda file: file.write_text("<!DOCTYPE html>\n<html><head></head></html>"), "contains no weights: it is a web"),
    (lambda file: file.write_text("\n  <html>"), "it is a web page: the address needs a login"),
    (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a"), "git lfs pull"),
    (lambda file: file.write_bytes(b"\x1f\x8b\x08 and so on"), "a gzip archive: unpack it first"),
    (lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    (lambda file: file.write_bytes(b""), "is empty: download or copy it again"),
    (lambda file: file.write_bytes(b"\n \n"), "is blank"),
    (lambda file: file.write_text("Not Found"), "neither safetensors nor a file of torch.save"),
    (lambda file: file.write_bytes(bytes(range(256)) * 9), "neither safetensors nor a file of torch.save"),
    (zipped, "neither safetensors nor a file of torch.save"),
    (lambda file: file.write_bytes(npz()), "neither safetensors nor a file of torch.save"),
    (lambda file: torch.save(torch.ones(2), file), "contains a Tensor, expected a state dict"),
    (lambda file: torch.save(nn.Linear(2, 2), file), "besides tensors it contains torch.nn.modules.linear.Linear"),
    (lambda file: file.mkdir(), "is a folder, expected a file: it contains no file of weights"),
    (lambda file: (file.mkdir(), (file / "a.ckpt").touch()), "is a folder, expected a file: it contains a.ckpt"),
    (lambda file: os.mkfifo(file), "is a pipe or a device, expected a file .*: save it first"),
    (lambda file: (file.mkdir(), (file / ".metadata").touch()), "of several processes: .*consolidate_checkpoint"),
])  # fmt: skip
def test_errors_name_the_kind_of_a_file_without_weights(tmp_path, write, message):
    write(tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path / "file")


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_head(tmp_path / "nothing.pth")


def test_without_safetensors_the_error_names_the_package(head, tmp_path, monkeypatch):
    save_file(export_head(head, "dino"), tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'safetensors needs safetensors: pip install "dino-head\[train\]"'):
        load_head(tmp_path / "a.safetensors")


MEMORY = """
import re, sys, torch
from dino_head.checkpoints import load_head

def peak():  # MiB; getrusage would include the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

small, large = sys.argv[1:]
load_head(small)
before = peak()
head = load_head(large)
loaded = peak()
if not large.endswith(".safetensors"):
    torch.load(large, weights_only=True)  # the check can fail: without mapping, everything is in memory
print(loaded - before, peak() - before, sum(p.numel() for p in head.parameters()) * 4 / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status of Linux")
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_only_the_head_of_a_large_file_stays_in_memory(tmp_path, kind):
    head = DINOProjectionHead(384, 512, 256, 16384, batch_norm=False)
    state = {f"teacher.head.{key}": value for key, value in export_head(head, "dino").items()}
    large, small = tmp_path / f"large.{kind}", tmp_path / f"small.{kind}"
    save = save_file if kind == "safetensors" else torch.save
    save(state, small)
    save({"teacher.backbone.weight": torch.zeros(280_000_000), **state}, large)
    assert large.stat().st_size > 2**30
    command = [sys.executable, "-c", MEMORY, str(small), str(large)]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    finally:
        large.unlink()
    grown, not_mapped, size = map(float, output.split())
    assert size > 16
    assert grown < 2 * size
    assert kind == "safetensors" or not_mapped > 1000
