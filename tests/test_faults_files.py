"""Files and folders of others, and the command line that reads them: what does not fit is said, by name."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.cli import main
from mono_quant_fx.cli.inputs import load_checkpoint, read_checkpoint
from mono_quant_fx.cli.rendering import CommandError
from mono_quant_fx.files.checkpoint_files import Checkpoint
from mono_quant_fx.files.folder import INDEX, SINGLE, open_tensors
from mono_quant_fx.files.reader import TensorFile
from mono_quant_fx.files.wrapped_names import align
from mono_quant_fx.storage.graph_json.names import check_path


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)).eval()


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -W ignore -m mono_quant_fx {line}"
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)


# ------------------------------------------------------------------ streams


def test_closed_streams_change_no_exit_code(tmp_path):
    """`inspect missing.safetensors >&-` ended with a traceback and code 1, which means "below the threshold"."""
    done = shell("inspect missing.safetensors >&-", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "mono-quant-fx: error: missing.safetensors: No such file or directory\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("inspect missing.safetensors >&- 2>&- <&-", 2), ("inspect a.safetensors >&- 2>&-", 0), ("--help >&-", 0),
        ("--help >/dev/full", 2), ("bogus 2>&-", 2), ("verify a.safetensors 2>/dev/full", 2),
        ("compare a.safetensors b.safetensors >&-", 2), ("export a.safetensors out >&- 2>&-", 2),
    ],
)  # fmt: skip
def test_every_command_ends_with_its_own_code(line, code, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    done = shell(line, tmp_path)
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--help", "inspect a.safetensors --tensors --format json"])
def test_a_pipe_that_nobody_reads_is_no_error_message(line, tmp_path):
    save_file({f"w{i}": torch.ones(2) for i in range(3000)}, tmp_path / "a.safetensors")
    end, out = os.pipe()
    os.close(end)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mono_quant_fx", *line.split()],
        cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(out)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# ------------------------------------------------------------------ what a file is


def lightning(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": net().state_dict()}, path)


def legacy(path: Path) -> None:
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("name", ["net.ckpt", "net.safetensors", "net", "net.bin"])
@pytest.mark.parametrize("write", [lightning, legacy, lambda path: save_file(net().state_dict(), path)])
def test_the_first_bytes_tell_what_a_checkpoint_is(write, name, tmp_path):
    """A torch.save'd .ckpt was "damaged: header of 578712552184433488 bytes"."""
    write(tmp_path / name)
    found, wanted = read_checkpoint(tmp_path / name), net().state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"PK\x03\x04" + bytes(100), "a zip archive, as torch.save writes it.*weights_only=True"),
        (pickle.dumps({"a": 1}) + bytes(100), "a pickle, as torch.save wrote it"),
        (b"GGUF\x03" + bytes(100), "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b'{"weight_map": {}}  ', "JSON text"),
        (bytes(range(1, 100)), "the header's length is .*damaged or no safetensors file"),
    ],
)
def test_every_reader_says_what_a_file_is_instead(start, words, tmp_path):
    path = tmp_path / SINGLE
    path.write_bytes(start)
    for read in (TensorFile, mq.load, lambda p: open_tensors(p.parent)):
        with pytest.raises(mq.FileFormatError, match=words):
            read(path)
    if "damaged" not in words:
        with pytest.raises(mq.CheckpointError, match=words.partition(".*")[0]):
            Checkpoint(tmp_path)


# ------------------------------------------------------------------ names with wrappers

WRAPPED = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "parallel": lambda n: f"module.{n}",
    "both": lambda n: f"module._orig_mod.{n}",
    "inside": lambda n: n.replace("0.", "0._fsdp_wrapped_module.", 1),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_wrappers_put_into_names_is_taken_out(kind, tmp_path):
    """`_orig_mod.` or `module.` before each name: "give the checkpoint of this very model", and no name of the file."""
    state = {WRAPPED[kind](name): tensor for name, tensor in net().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)).eval()
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True))
    report = mq.quantize_checkpoint(tmp_path / "a.safetensors", model, tmp_path / "out", group_size=32)
    assert report.unused == () and len(report.accuracy.rows) == 2
    x = torch.randn(3, 64)
    assert torch.equal(
        mq.load(tmp_path / "out", model).graph_module(x), mq.quantize(net(), group_size=32).graph_module(x)
    )


def test_a_name_that_is_the_models_own_is_no_wrapper():
    assert align(["module.a", "a"], ["module.a"]) == {"module.a": "module.a"}
    assert align(["module.a", "_orig_mod.a"], ["a"]) == {}  # which one is meant is not known
    assert align(["a"], ["_orig_mod.a"]) == {"_orig_mod.a": "a"}


def test_other_names_are_shown_on_both_sides(tmp_path):
    save_file({f"encoder.{name}": tensor for name, tensor in net().state_dict().items()}, tmp_path / "a.safetensors")
    with pytest.raises(CommandError, match=r"encoder\.0\.bias.*in the checkpoint and not.*0\.weight.*in the model and"):
        load_checkpoint(net(), tmp_path / "a.safetensors")
    with pytest.raises(mq.PlanError, match=r"0\.weight, 0\.bias, 2\.weight and 1 more.*are encoder\.0\.bias, enc"):
        mq.quantize_checkpoint(tmp_path / "a.safetensors", net(), tmp_path / "out", group_size=32)


# ------------------------------------------------------------------ folders

NAMES = ["", "..", ".", "../a.safetensors", "/etc/passwd", "in/a.safetensors", "..\\a.safetensors", "a\0.safetensors"]
READERS = {"command line": read_checkpoint, "stream": open_tensors, "load": mq.load, "import": Checkpoint}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_files_of_its_folder(name, reader, tmp_path):
    """ "" or ".." as a file: RecursionError, or reading outside of the folder."""
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "in" / "a.safetensors")
    folder = tmp_path / "in"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(mq.MonoQuantError, match=r"w'.*the (plain )?name of a"):
        READERS[reader](folder)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("through", ["index", "single", "folder"])
def test_a_link_out_of_the_folder_is_refused(through, reader, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "in"
    outside.mkdir()
    folder.mkdir()
    save_file({"w": torch.ones(2)}, outside / "a.safetensors")
    link = folder / (SINGLE if through == "single" else "a.safetensors")
    link.symlink_to(outside / "a.safetensors")
    if through != "single":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    if through == "folder":  # a folder that is a link itself is the user's own choice; what is in it stays inside
        folder = tmp_path / "link"
        folder.symlink_to(tmp_path / "in")
    with pytest.raises(mq.MonoQuantError, match="a link that leads out of its folder"):
        READERS[reader](folder)


def test_links_within_a_folder_and_in_the_cache_of_hugging_face_are_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, blobs / "0123")
    (snapshot / SINGLE).symlink_to("../../blobs/0123")
    for read in (read_checkpoint, open_tensors, Checkpoint):
        assert "w" in (read(snapshot).entries if read is open_tensors else read(snapshot))
    save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    (tmp_path / SINGLE).symlink_to("b.safetensors")
    assert list(open_tensors(tmp_path).entries) == ["w"]


# ------------------------------------------------------------------ complex numbers


class Spectral(nn.Module):
    """A linear layer, and a complex weight and buffer on its spectrum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.mix = nn.Linear(64, 64), nn.Parameter(torch.randn(33, 33, dtype=torch.complex64) / 8)
        self.gain = nn.Parameter(torch.randn(33, dtype=torch.complex64).conj())
        self.register_buffer("phase", torch.polar(torch.ones(33), torch.arange(33.0)))

    def forward(self, x):
        return torch.fft.irfft((torch.fft.rfft(self.fc(x)) * self.phase * self.gain) @ self.mix, n=64)


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_complex_weights_have_rows_and_files_hold_them(method, tmp_path, capsys):
    """A complex weight had no row, and a complex buffer could not be saved, although the format has C64."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    result = mq.quantize(mq.capture(Spectral().eval(), x, method=method), group_size=32, skip_param_threshold=8)
    rows = {row.weight: row for row in result.accuracy.rows}
    assert rows.keys() == {"fc.weight", "mix", "gain"}
    for name, values in (("mix", 33 * 33), ("gain", 33)):
        reason = "its values are complex64, and codes stand for real numbers"
        assert (rows[name].scheme, rows[name].reason, rows[name].bytes_before) == ("complex64", reason, 8 * values)
    assert result.info.skipped_layers["mix"] == reason
    result.save(tmp_path / "a.safetensors", graph=True)
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.entries["phase"].dtype is torch.complex64
    for again in (mq.load(tmp_path / "a.safetensors"), mq.load(tmp_path / "a.safetensors", Spectral().eval())):
        assert torch.equal(again.graph_module(x), result.graph_module(x)) and again.accuracy == result.accuracy
    assert main.main(["verify", str(tmp_path / "a.safetensors")]) == 0


def test_a_complex_checkpoint_is_streamed(tmp_path):
    save_file({k: v.resolve_conj() for k, v in Spectral().state_dict().items()}, tmp_path / "a.safetensors")
    mq.quantize_checkpoint(tmp_path / "a.safetensors", Spectral().eval(), tmp_path / "out", group_size=32)
    x = torch.randn(3, 64)
    whole = mq.quantize(Spectral().eval(), group_size=32)
    assert torch.equal(mq.load(tmp_path / "out", Spectral().eval()).graph_module(x), whole.graph_module(x))


# ------------------------------------------------------------------ names in a file

ODD = ["a b", "it's", "größe", "层", "a/b", "a-b", "λ x: 1 # y", "__x", "😀", "x" * 9000, "{y}", "a;b", "1", "s" * 300]


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_what_save_writes_load_reads_whatever_the_names(method, tmp_path):
    """Names of more than 200 characters, or others than of letters, could be written and not read back."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ODD:
                self.add_module(name, nn.Linear(32, 32))

        def forward(self, x):
            for name in ODD:
                x = self._modules[name](x).relu()
            return x

    torch.manual_seed(0)
    x = torch.randn(2, 32)
    result = mq.quantize(mq.capture(Odd().eval(), x, method=method), group_size=32, skip_param_threshold=8)
    result.save(tmp_path / "a.safetensors", graph=True)
    again = mq.load(tmp_path / "a.safetensors")
    assert torch.equal(again.graph_module(x), result.graph_module(x))
    assert {row.weight for row in again.accuracy.rows} == {f"{name}.weight" for name in ODD}


@pytest.mark.parametrize(
    "path", ['a"b', "a\\", "a\nb", "", "a..b", "class", "\ufb01x", "__class__", "forward", ".".join("a" * 200)]
)
def test_a_name_that_torch_fx_would_spell_otherwise_is_refused(path):
    with pytest.raises(mq.GraphFormatError):
        check_path(path, "a path")
