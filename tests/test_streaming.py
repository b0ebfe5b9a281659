"""quantize_checkpoint: bit for bit what quantize and save give, in little memory, whatever interrupts it."""

import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.files import writer as tensor_writer
from mono_quant_fx.files.folder import INDEX, PARTIAL, SINGLE, TensorFolder, open_tensors
from mono_quant_fx.files.reader import TensorFile, TensorWriter, write_tensors
from mono_quant_fx.files.resumable_folder import PartialFolder
from mono_quant_fx.storage.saving import DIGESTS, KEY, digest
from tests import streaming_kills
from tests.models import hopeless_
from tests.test_storage import CASES, Attention, assert_same, quantized

DATA_FREE = [name for name in CASES if name not in ("gptq", "activations")]
QUIET = {"accuracy_warning": "ignore", "progress": False}


def save_float(path: Path, model: nn.Module, shards: int = 1) -> Path:
    """A checkpoint of the state_dict, tied tensors once; several files have an index."""
    once = {id(t): n for n, t in reversed(list(model.state_dict(keep_vars=True).items()))}
    state = {n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if once[id(t)] == n}
    if shards == 1:
        write_tensors(path, state)
        return path
    path.mkdir()
    names, weight_map = list(state), {}
    for i in range(shards):
        part = names[i::shards]
        write_tensors(path / f"model-{i}.safetensors", {n: state[n] for n in part})
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def skeleton_of(model: nn.Module) -> nn.Module:
    """On the meta device, tied as it was, with the values of buffers outside the state_dict."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a folder that was written."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DATA_FREE)
def test_one_file_has_the_bits_that_save_writes(name, dtype, tmp_path):
    result, model, example = quantized(name, dtype)
    result.info.seconds.clear()
    mq.save(result, tmp_path / "saved.safetensors")
    source = save_float(tmp_path / "float.safetensors", model)
    out = tmp_path / "streamed.safetensors"
    report = mq.quantize_checkpoint(source, skeleton_of(model), out, example_inputs=example, **CASES[name][2], **QUIET)
    saved, streamed = TensorFile(tmp_path / "saved.safetensors"), TensorFile(out)
    assert streamed.entries == saved.entries
    assert all(torch.equal(saved.tensor(n), streamed.tensor(n)) for n in saved.entries)
    ours, theirs = (json.loads(f.metadata[KEY]) for f in (streamed, saved))
    assert ours.pop("config") | {"accuracy_warning": ""} == theirs.pop("config") | {"accuracy_warning": ""}
    assert ours == theirs
    assert (report.accuracy, report.info, report.files) == (result.accuracy, result.info, (out.name,))
    assert_same(mq.load(out, model), result, example)


@pytest.mark.parametrize("name", ["merged", "asymmetric", "tied", "int8"])
def test_files_of_a_folder_are_loaded_as_one(name, tmp_path):
    result, model, example = quantized(name)
    result.info.seconds.clear()
    source = save_float(tmp_path / "float", model, shards=3)
    call = {"example_inputs": example, **CASES[name][2], **QUIET}
    report = mq.quantize_checkpoint(source, skeleton_of(model), tmp_path / "out", shard_bytes=4000, **call)
    assert len(report.files) > 1
    assert report.files[0] == f"model-00001-of-{len(report.files):05}.safetensors"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*report.files, INDEX}
    assert_same(mq.load(tmp_path / "out", model), result, example)
    opened = TensorFolder(tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(e.nbytes for e in opened.entries.values()) == report.bytes_written
    for file in opened.files.values():
        names = [n for n in file.entries if n != DIGESTS]
        assert torch.equal(file.tensor(DIGESTS), torch.stack([digest(file.tensor(n)) for n in names]))
    for parts in json.loads(opened.metadata[KEY])["stacked"].values():
        assert opened.span(parts) is not None, "merged parts are one view"


def test_a_folder_gets_one_file_where_all_fits(tmp_path):
    result, model, example = quantized("merged")
    source = save_float(tmp_path / "float.safetensors", model)
    skeleton, call = skeleton_of(model), {"group_size": 16, **QUIET}
    several = mq.quantize_checkpoint(source, skeleton, tmp_path / "out", shard_bytes=2000, **call)
    assert len(several.files) > 1
    mq.quantize_checkpoint(source, skeleton, tmp_path / "out", **call)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [SINGLE], "the files of the older model are gone"
    result.info.seconds.clear()
    assert_same(mq.load(tmp_path / "out", model), result, example)
    again = mq.quantize_checkpoint(source, skeleton, tmp_path / "out", shard_bytes=2000, **call)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*again.files, INDEX}


def test_what_a_report_says(tmp_path):
    _, model, _ = quantized("merged")
    state = {n: t.detach() for n, t in model.state_dict().items()} | {"other": torch.zeros(3)}
    write_tensors(tmp_path / "float.safetensors", state)
    seen = []
    report = mq.quantize_checkpoint(
        tmp_path / "float.safetensors", skeleton_of(model), tmp_path / "out", group_size=16,
        accuracy_warning="ignore", progress=lambda *numbers: seen.append(numbers),
    )  # fmt: skip
    total = sum(t.nbytes for n, t in state.items() if n != "other") + model.shift.nbytes
    assert seen[-1] == (8, 8, total, total)
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert report.bytes_read == total
    text = str(report)
    assert "4 layers quantized, 0 skipped" in text
    assert "not in the model: other" in text
    assert "out: 1 file; " in text
    assert "resumed" not in text


def test_a_critical_finding_comes_with_the_report(tmp_path):
    model = copy.deepcopy(quantized("merged")[1])
    hopeless_(model)
    source = save_float(tmp_path / "float.safetensors", model)
    call = {"group_size": 16, "sqnr_error_threshold": 60.0, "sqnr_warning_threshold": 61.0}
    with pytest.raises(mq.AccuracyError, match="CRITICAL") as e:
        mq.quantize_checkpoint(source, skeleton_of(model), tmp_path / "out", accuracy_warning="error", **call)
    assert isinstance(e.value.result, mq.CheckpointReport)
    assert mq.load(tmp_path / "out", model).warnings == e.value.result.warnings
    with pytest.warns(mq.AccuracyWarning, match="CRITICAL"):
        mq.quantize_checkpoint(source, skeleton_of(model), tmp_path / "out", **call)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def refused(tmp_path, said, error, model=None, source=None, out="out", **settings):
    _, made, _ = quantized("merged")
    source = source or save_float(tmp_path / "float.safetensors", made)
    with pytest.raises(error, match=said):
        mq.quantize_checkpoint(source, model or skeleton_of(made), tmp_path / out, **settings, **QUIET)
    assert not [p for p in tmp_path.rglob("*") if p.name in (PARTIAL, "out", "out.safetensors")]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "gptq"}, "algorithm='gptq' needs calibration_data.*leave this setting out, or use quantize"),
        ({"activations": "int8"}, "activations='int8' needs calibration_data"),
        ({"bias_correction": True}, "bias_correction=True needs"),
        ({"shard_bytes": 0}, "shard_bytes=0: a positive number"),
        ({"bit": 4}, "no such setting; did you mean bits"),
        ({"shard_bytes": 5000, "out": "out.safetensors"}, "more than shard_bytes allows in one file; give a folder"),
    ],
)
def test_settings_that_cannot_be_followed(settings, said, tmp_path):
    refused(tmp_path, said, mq.ConfigError, **settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.bfloat16(), r"is float32 in the checkpoint and bfloat16 in the model:.*model.to\(torch.float32\)"),
        (lambda m: m.to("meta"), "does not have shift.*no part of the state_dict.*give that buffer its value"),
        (lambda m: setattr(m, "out", nn.Linear(64, 65, bias=False)) or m, r"out.weight is \[64, 64\] .* \[65, 64\]"),
        (lambda m: setattr(m, "out", nn.Linear(64, 64)) or m, "does not have out.bias, which Attention needs"),
    ],
)
def test_a_model_that_is_not_the_checkpoints(change, said, tmp_path):
    refused(tmp_path, said, mq.PlanError, model=change(Attention()).eval(), group_size=16)


def test_a_model_that_cannot_be_captured(tmp_path):
    refused(tmp_path, "Constant", mq.CaptureError, model=Constant().eval())
    refused(tmp_path, r"call model.eval\(\) first", mq.CaptureError, model=Attention())


def test_tied_weights_that_differ(tmp_path):
    _, model, example = quantized("tied")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    write_tensors(tmp_path / "float.safetensors", state)
    call = {"example_inputs": example, "default_skips": False, **QUIET}
    mq.quantize_checkpoint(tmp_path / "float.safetensors", skeleton_of(model), tmp_path / "out", **call)
    state["head.weight"] += 1
    write_tensors(tmp_path / "float.safetensors", state)
    with pytest.raises(mq.PlanError, match=r"table.weight and head.weight are one tensor|head.weight and table.weight"):
        mq.quantize_checkpoint(tmp_path / "float.safetensors", skeleton_of(model), tmp_path / "out", **call)


def test_a_weight_with_nan(tmp_path):
    _, model, _ = quantized("merged")
    with torch.no_grad():
        model.k.weight[3, 5] = float("nan")
    source = save_float(tmp_path / "float.safetensors", model)
    with pytest.raises(mq.WeightError, match=r"weight 'k.weight' cannot be quantized: it holds NaN"):
        mq.quantize_checkpoint(source, skeleton_of(model), tmp_path / "out.safetensors", group_size=16, **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["float.safetensors"]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"", "the index starts with"),
        (b"[1]", "the index starts with"),
        (b'{"weight_map": {"a": "a.safetensors"}', "unbalanced"),
        (b'{"weight_map": 3}', "weight_map is 3; it must map"),
        (b'{"weight_map": {}}', "weight_map is {}; it must map"),
        (b'{"weight_map": {"a": 3}}', "'a' is said to be in 3"),
        (b'{"weight_map": {"a": "../a.safetensors"}}', "without a path"),
        (b'{"weight_map": {"a": "/etc/a.safetensors"}}', "without a path"),
        (b'{"weight_map": {"a": ".safetensors"}}', "without a path"),
        (b'{"weight_map": {"a": "a\\u0000.safetensors"}}', "without a path"),
        (b'{"weight_map": {"a": "a.bin"}}', "without a path"),
        (b'{"metadata": [], "weight_map": {"a": "a.safetensors"}}', "metadata is"),
        (b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "'a' stands twice in the index"),
        (b'{"weight_map": {"a": "b.safetensors"}}', "b.safetensors', which is missing"),
        (b'{"weight_map": {"b": "a.safetensors"}}', "tensor 'b' is not in a.safetensors"),
        (b'{"weight_map": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "deeper than 3 levels"),
    ],
)
def test_a_hostile_index_is_a_clean_error(index, said, tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(mq.FileFormatError, match=said):
        open_tensors(tmp_path)
    with pytest.raises(mq.FileFormatError, match=said):
        mq.load(tmp_path, Attention().eval())


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(mq.FileFormatError, match=r"a folder needs model.safetensors, or model.safetensors.index.json"):
        mq.load(tmp_path, Attention().eval())


def test_the_checkpoint_is_never_the_destination(tmp_path):
    _, model, _ = quantized("merged")
    source = save_float(tmp_path / "float", model, shards=2)
    before = contents(source)
    for out in (source, source / "model-0.safetensors"):
        with pytest.raises(mq.ConfigError, match="the checkpoint itself is there"):
            mq.quantize_checkpoint(source, skeleton_of(model), out, group_size=16, **QUIET)
    assert contents(source) == before
    with pytest.raises(mq.ConfigError, match="a file is there"):
        mq.quantize_checkpoint(source / "model-0.safetensors", skeleton_of(model), source / INDEX, **QUIET)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The job of streaming_kills, before and after."""
    folder = tmp_path_factory.mktemp("made")
    streaming_kills.make(folder)
    old = contents(folder / "out")
    shutil.copytree(folder, folder / "done")
    streaming_kills.job(folder / "done")
    return folder, old, contents(folder / "done" / "out")


@pytest.fixture
def prepared(made, tmp_path):
    """A copy of the job, what is at its destination, and what it gives when nothing interrupts it."""
    folder, old, expected = made
    shutil.copytree(folder, tmp_path / "job", ignore=shutil.ignore_patterns("done"))
    return tmp_path / "job", old, expected


def test_a_full_disk_loses_one_file_of_work(prepared, monkeypatch):
    folder, old, expected = prepared
    put, room = TensorWriter._put, [150_000]

    def full(self, data, at):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, data, at)

    monkeypatch.setattr(tensor_writer.TensorWriter, "_put", full)
    with pytest.raises(OSError, match="No space left on device"):
        streaming_kills.job(folder)
    monkeypatch.undo()
    out = contents_without_partial(folder / "out")
    assert out == old
    report = streaming_kills.job(folder)
    assert report.resumed_from == 4
    assert "resumed: 4 of" in str(report)
    assert contents(folder / "out") == expected


def test_a_run_of_something_else_starts_afresh_and_says_so(prepared, monkeypatch):
    folder, _, _ = prepared
    interrupt_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        streaming_kills.job(folder)
    monkeypatch.undo()
    call = streaming_kills.SETTINGS | {"group_size": 32}
    with pytest.warns(UserWarning, match=r"interrupted run is there, but settings and .*model differ; starting afresh"):
        report = mq.quantize_checkpoint(
            folder / "float0.safetensors", streaming_kills.net().to("meta"), folder / "out", **call
        )
    assert report.resumed_from == 0


def test_what_a_crash_has_moved_goes_when_something_else_is_written(prepared, monkeypatch):
    folder, _, _ = prepared
    move, left = os.replace, [4]

    def stop(old, new):
        if Path(new).parent.name == "out":
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        move(old, new)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        streaming_kills.job(folder)
    monkeypatch.undo()
    assert INDEX not in contents_without_partial(folder / "out")
    with pytest.warns(UserWarning, match="starting afresh"):
        streaming_kills.quantize(folder, 0, shard_bytes=90_000)
    assert len(contents(folder / "out")) == 6
    mq.load(folder / "out", streaming_kills.net())


def test_two_processes_do_not_write_one_folder(prepared):
    folder, old, _ = prepared
    with PartialFolder(folder / "out", {}), pytest.raises(mq.FileFormatError, match="another process is writing here"):
        streaming_kills.job(folder)
    assert contents_without_partial(folder / "out") == old


def test_a_checkpoint_that_changed_starts_afresh(prepared, monkeypatch):
    folder, _, _ = prepared
    interrupt_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        streaming_kills.job(folder)
    monkeypatch.undo()
    os.replace(folder / "float1.safetensors", folder / "float0.safetensors")
    os.utime(folder / "float0.safetensors", (1, 1))
    with pytest.warns(UserWarning, match="but checkpoint differ"):
        assert streaming_kills.job(folder).resumed_from == 0


def interrupt_at(monkeypatch, count: int) -> None:
    """Raises at the commit of a file, as Ctrl-C there would."""
    commit, left = TensorWriter._commit, [count]

    def stop(self):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        commit(self)

    monkeypatch.setattr(TensorWriter, "_commit", stop)


def contents_without_partial(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != PARTIAL}


#: From the 47th change of the folder on the files are moved; there are 78.
FAST = (1, 2, 3, 6, 30, 47, 48, 49, 51, 53, 58, 63, 64, 65, 67)
STEPS = [pytest.param(i, marks=() if i in FAST else pytest.mark.slow) for i in range(78)]


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_between_any_two_changes_of_the_folder(step, prepared, monkeypatch):
    """Stops before the nth rename or removal: what is there is old, new or says that it is incomplete."""
    folder, old, expected = prepared
    count = [step]

    class Crash(BaseException):
        """No handler of the code may clean up after it."""

    def counted(change):
        def changed(*args, **kwargs):
            count[0] -= 1
            if count[0] < 0:
                raise Crash
            return change(*args, **kwargs)

        return changed

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "unlink", counted(os.unlink))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    try:
        streaming_kills.job(folder)
        crashed = False
    except Crash:
        crashed = True
    monkeypatch.undo()
    assert crashed
    check_destination(folder, old, expected)
    streaming_kills.job(folder)
    assert contents(folder / "out") == expected


def check_destination(folder: Path, old: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """Which of the three states it is."""
    found = contents_without_partial(folder / "out")
    if INDEX not in found:
        with pytest.raises(mq.FileFormatError, match="is incomplete: quantize_checkpoint was interrupted"):
            mq.load(folder / "out", streaming_kills.net())
        return "incomplete"
    whole = old if found[INDEX] == old[INDEX] else expected
    assert whole.items() <= found.items()
    mq.load(folder / "out", streaming_kills.net())
    return "old" if whole is old else "new"


def killed_once(folder: Path, delay: float) -> None:
    """Starts the job in a process of its own and kills it."""
    program = [sys.executable, "-m", "tests.streaming_kills", str(folder)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("\n")
        child.stdin.flush()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)


def test_a_killed_process_is_gone_on_with(prepared):
    folder, old, expected = prepared
    killed_once(folder, 0.25)
    check_destination(folder, old, expected)
    streaming_kills.job(folder)
    assert contents(folder / "out") == expected


@pytest.mark.slow
def test_fifty_kills(prepared):
    folder, old, expected = prepared
    rng, seen = random.Random(0), []
    for _ in range(50):
        killed_once(folder, rng.uniform(0.05, 0.8))
        seen.append(check_destination(folder, old, expected))
        if seen[-1] == "new":  # from the start again
            for file in (folder / "out").iterdir():
                file.unlink() if file.is_file() else [f.unlink() for f in file.iterdir()] and file.rmdir()
            for name, data in old.items():
                (folder / "out" / name).write_bytes(data)
    streaming_kills.job(folder)
    assert contents(folder / "out") == expected
    assert "old" in seen


PEAK = """
import sys, threading, time, torch
from torch import nn
import mono_quant_fx as mq

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024

with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(16))).bfloat16().eval()
peak, before, stop = [0.0], resident(), threading.Event()

def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], resident())

thread = threading.Thread(target=watch)
thread.start()
mq.quantize_checkpoint(sys.argv[1], model, sys.argv[2], progress=False, accuracy_warning="ignore")
stop.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.slow
def test_memory_holds_a_part_of_the_model(tmp_path):
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    entries = [(f"{i}.weight", torch.bfloat16, (4096, 4096)) for i in range(16)]
    with TensorWriter(tmp_path / "float.safetensors", entries) as writer:
        for name, *_ in entries:
            writer.write(name, weight)
    assert (tmp_path / "float.safetensors").stat().st_size > 512 << 20
    program = [sys.executable, "-c", PEAK, str(tmp_path / "float.safetensors"), str(tmp_path / "out")]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 256, "MiB beyond what the interpreter and torch take"


def test_rows_are_written_in_any_order_of_tensors_and_read_in_parts(tmp_path):
    a, b = torch.arange(12.0).view(6, 2), torch.arange(5, dtype=torch.int8)
    entries = [("a", a.dtype, (6, 2)), ("b", b.dtype, (5,)), ("c", torch.float32, ()), ("d", torch.float32, (0, 3))]
    with TensorWriter(tmp_path / "x", entries, {"k": "v"}, spare=100) as writer:
        writer.write_rows("b", b[:2])
        writer.write_rows("a", a)
        writer.write_rows("b", b[2:])
        writer.write_rows("c", torch.tensor(3.0))
        for name, tensor, said in (("b", b[:1], "has 5 rows; 5 are written"), ("z", b, "write what was declared")):
            with pytest.raises(mq.FileFormatError, match=said):
                writer.write_rows(name, tensor)
        with pytest.raises(mq.FileFormatError, match="were set aside"):
            writer.describe({"k": "v" * 200})
        writer.describe({"k": "v" * 90})
    with TensorFile(tmp_path / "x") as file:
        assert file.metadata == {"k": "v" * 90}
        assert torch.equal(file.tensor("a"), a)
        assert torch.equal(file.read_rows("a", 1, 4), a[1:4])
        assert torch.equal(file.read_rows("b", 2, 5), b[2:])
        assert file.read_rows("c", 0, 1) == 3.0
        assert file.read_rows("d", 0, 0).shape == (0, 3)


def test_rows_that_are_missing_leave_no_file(tmp_path):
    with (
        pytest.raises(mq.FileFormatError, match="tensor 'a' was not written"),
        TensorWriter(tmp_path / "x", [("a", torch.float32, (6, 2))]) as writer,
    ):
        writer.write_rows("a", torch.zeros(5, 2))
    assert not list(tmp_path.iterdir())
