"""The command line: what it prints, its exit codes, and one line on stderr for whatever may be wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.cli import main as cli
from mono_quant_fx.cli.compare import change, differences, loss_verdict
from mono_quant_fx.cli.main import main
from mono_quant_fx.cli.options import field_helps
from mono_quant_fx.cli.rendering import FORMATS, CommandError, printable
from mono_quant_fx.files.reader import TensorFile, TensorWriter
from mono_quant_fx.storage import saving
from tests.tensor_file_mutants import mutants
from tests.test_docs import ROOT, blocks, read, run, stripped

NETS = """
import sys
import torch
from torch import nn

MARK = None


def make():
    print("the factory's own words")
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 16))


def hollow_make():
    with torch.device("meta"):
        return make()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids, scale=None):
        y = self.head(self.body(self.table(ids)).relu())
        return y if scale is None else y * scale


def fails():
    raise ValueError("no such\\nweights")


def leaves():
    sys.exit(3)


def interrupts():
    raise KeyboardInterrupt


def number():
    return 3


def hollow():
    with torch.device("meta"):
        return nn.Linear(64, 64)
"""
ERROR = "mono-quant-fx: error: "


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model's code, its checkpoint, inputs, and two quantized files, one calibrated."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_nets.py").write_text(NETS)
    (folder / "cli_broken.py").write_text("raise RuntimeError('at import')\n")
    torch.manual_seed(0)
    space: dict = {}
    exec(compile(NETS, "cli_nets.py", "exec"), space)
    model = space["make"]()
    save_file(model.state_dict(), folder / "net.safetensors")
    torch.save({"state_dict": model.state_dict()}, folder / "net.pt")
    save_file({"input": torch.randn(64, 128)}, folder / "inputs.safetensors")
    data, skip = [torch.randn(64, 128)], ["2"]
    settings = {"plain": {}, "calibrated": {"calibration_data": data}, "skipped": {"modules_to_not_convert": skip}}
    for name, own in settings.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mq.quantize(model.eval(), group_size=32, **own).save(folder / f"{name}.safetensors")
    tied = space["Tied"]().state_dict()
    del tied["head.weight"]
    save_file(tied, folder / "tied.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", list(sys.path))


QUANTIZE = ["quantize", "net.safetensors", "--model", "cli_nets:make", "--group-size", "32"]


def said(capsys, arguments, code=0):
    """stdout and stderr of a command that ends with this code."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    return capsys.readouterr()


def failure(capsys, arguments, code=2):
    """The one line on stderr of a command that fails and prints nothing else."""
    out, err = said(capsys, arguments, code)
    assert out == ""
    lines = [line for line in err.splitlines() if line != "the factory's own words"]
    assert len(lines) == 1 and lines[0].startswith(ERROR), err
    return lines[0].removeprefix(ERROR)


def usage(capsys, arguments):
    """The one line on stderr of a command that is not understood."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith(ERROR), err
    return err.removeprefix(ERROR)


@pytest.mark.parametrize("checkpoint", ["net.safetensors", "net.pt", "folder", "sharded"])
def test_quantize_writes_what_the_library_writes(checkpoint, work, tmp_path, capsys):
    if checkpoint in ("folder", "sharded"):
        state = torch.load(work / "net.pt", weights_only=True)["state_dict"]
        names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state)}
        if checkpoint == "folder":
            save_file(state, tmp_path / "model.safetensors")
        else:
            for part in set(names.values()):
                save_file({n: t for n, t in state.items() if names[n] == part}, tmp_path / part)
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        checkpoint = tmp_path
    out = tmp_path / "out.safetensors"
    command = ["quantize", checkpoint, *QUANTIZE[2:], "--out", out]
    printed, err = said(capsys, command)
    assert err == "the factory's own words\n"
    with TensorFile(out) as a, TensorFile(work / "plain.safetensors") as b:
        assert a.entries == b.entries
        assert all(a.digest(name) == b.digest(name) for name in a.entries)
    table = str(mq.load(out, _skeleton()).accuracy)
    assert printed.startswith(table)
    assert printed[len(table) :].strip() == (
        "3 layers quantized, 1 skipped; 43.7 kB -> 7.4 kB (5.89x); model output SQNR: not measured "
        "(no calibration or evaluation data)"
    )


def _skeleton():
    layers = nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 16)
    return nn.Sequential(*layers).eval()


def test_calibration_measures_and_the_settings_arrive(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    options = ["--calibration", "inputs.safetensors", "--batch-size", "10", "--num-calibration-samples", "25"]
    options += ["--skip", "4", "--overrides", "2=int4 g32 asym", "--algorithm", "clip", "--no-merge-linears"]
    options += ["--damping", "0.5", "--activations", "none", "--accuracy-warning", "ignore", "--format", "json"]
    data = json.loads(said(capsys, [*QUANTIZE, *options, "--out", out]).out)
    config = mq.QuantConfig(
        group_size=32, num_calibration_samples=25, modules_to_not_convert=("4",), damping=0.5, algorithm="clip",
        overrides=(("2", "int4 g32 asym"),), merge_linears=False, accuracy_warning="ignore",
    )  # fmt: skip
    assert mq.load(out, _skeleton()).config == config
    assert data["config"]["damping"] == 0.5 and data["total"]["samples"] == 25
    rows = {row["module"]: row for row in data["rows"]}
    assert rows["2"]["scheme"] == "int4 g32 asym" and rows["2"]["algorithm"] == "clip"
    assert rows["4"]["reason"] == "modules_to_not_convert: 4" and rows["0"]["local_sqnr_db"] > 20


def test_an_example_and_tied_names_that_the_file_lacks(tmp_path, capsys):
    save_file({"ids": torch.zeros(2, 5, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    out = tmp_path / "out.safetensors"
    command = ["quantize", "tied.safetensors", "--model", "cli_nets:Tied", "--group-size", "16", "--example"]
    said(capsys, [*command, tmp_path / "ids.safetensors", "--out", out])
    assert "table.weight" in TensorFile(out).entries and "head.weight" not in TensorFile(out).entries
    said(capsys, ["verify", out])


def test_every_setting_is_an_option_with_a_help():
    helps = field_helps()
    assert helps.keys() == mq.QuantConfig.__dataclass_fields__.keys() and all(len(text) > 10 for text in helps.values())


def test_help_of_every_command(capsys):
    for command in ("", "quantize", "inspect", "compare", "verify", "export", "demo"):
        with pytest.raises(SystemExit) as stopped:
            main([*filter(None, [command]), "--help"])
        assert stopped.value.code == 0
        assert "Exit codes: 0 good, 1 accuracy below" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mono-quant-fx {mq.__version__}\n"


@pytest.mark.parametrize("calibrated", [False, True])
def test_below_the_threshold_is_1_and_no_file(calibrated, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("older")
    command = [*QUANTIZE, "--out", out, "--algorithm", "rtn"]
    command += ["--calibration", "inputs.safetensors"] if calibrated else []
    printed, err = said(capsys, [*command, "--fail-below-db", "90"], 1)
    what = "the model output" if calibrated else r"weight \d.weight"
    *_, line = err.splitlines()
    assert re.fullmatch(rf"{ERROR}{what} has \d+\.\d\d dB, below 90 dB; .*out.safetensors is not written", line)
    assert "layers quantized" in printed and out.read_text() == "older"
    said(capsys, [*command, "--fail-below-db", "5"])
    assert out.stat().st_size > 1000
    assert said(capsys, ["inspect", out, "--fail-below-db", "90"], 1).err.startswith(ERROR)


def test_a_model_without_values_is_quantized_weight_by_weight(tmp_path, capsys):
    files = [tmp_path / f"{name}.safetensors" for name in ("whole", "streamed")]
    for file, factory in zip(files, ("make", "hollow_make"), strict=True):
        said(capsys, ["quantize", "net.safetensors", "--model", f"cli_nets:{factory}", "--out", file])
    whole, streamed = (TensorFile(file) for file in files)
    assert whole.entries == streamed.entries
    assert all(torch.equal(whole.tensor(name), streamed.tensor(name)) for name in whole.entries)
    command = ["quantize", "net.safetensors", "--model", "cli_nets:hollow_make", "--out", files[0]]
    before = files[0].read_bytes()
    assert said(capsys, [*command, "--fail-below-db", "90"], 1).err.strip().endswith("is not written")
    assert files[0].read_bytes() == before and sorted(tmp_path.iterdir()) == sorted(files)


def test_a_critical_finding_that_the_user_made_an_error_is_1(tmp_path, capsys):
    options = ["--accuracy-warning", "error", "--sqnr-error-threshold", "80", "--sqnr-warning-threshold", "90"]
    options += ["--evaluation-data", "inputs.safetensors"]
    line = failure(capsys, [*QUANTIZE, *options, "--out", tmp_path / "x.safetensors"], 1)
    assert line.startswith("CRITICAL: far too noisy: 3 of 4 nodes below 80 dB")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--model": "net"}, "--model net: write package.module:factory"),
        ({"--model": "cli_none:make"}, "importing cli_none raised ModuleNotFoundError: No module named 'cli_none'"),
        ({"--model": "cli_broken:make"}, "importing cli_broken raised RuntimeError: at import"),
        ({"--model": "cli_nets:none"}, "module 'cli_nets' has no attribute 'none'"),
        ({"--model": "cli_nets:MARK"}, "MARK is a NoneType; a function or class is needed"),
        ({"--model": "cli_nets:number"}, "number() returned a int; a torch.nn.Module is needed"),
        ({"--model": "cli_nets:fails"}, "fails() raised ValueError: no such weights"),
        ({"--model": "cli_nets:leaves"}, "leaves() raised SystemExit: 3"),
        ({"--model": "cli_nets:hollow"}, "net.safetensors"),
        ({"--model": "cli_nets:hollow_make", "--calibration": "inputs.safetensors"}, "is on the meta device"),
        (
            {"--model": "cli_nets:Tied"},
            "does not fit the model: 0.bias, 0.weight, 2.bias and 5 more: in the checkpoint and not in",
        ),
        ({"--bits": "3"}, "bits=3: bits is 4 or 8"),
        ({"--skip": "layers"}, "layers"),
        ({"--algorithm": "clip"}, "algorithm='clip' needs calibration_data"),
        ({"--out": "none/x.safetensors"}, "there is no folder none"),
        ({"--out": "."}, "this is a folder"),
        ({"--out": "net.safetensors"}, "this would replace what is read from net.safetensors"),
        ({"--calibration": "none"}, "none: No such file or directory"),
        ({"--calibration": "net.safetensors"}, "forward has no parameter '0.bias'; it has input"),
        ({"--graph": None, "--calibration": "cli_nets.py"}, "the file is damaged or no safetensors file"),
    ],
)
def test_what_quantize_refuses(changes, expected, tmp_path, capsys):
    given = {"--model": "cli_nets:make", "--out": tmp_path / "x.safetensors", **changes}
    words = [word for pair in given.items() for word in pair if word is not None]
    assert expected in failure(capsys, ["quantize", "net.safetensors", *words])
    assert not (tmp_path / "x.safetensors").exists()


def test_calibration_that_does_not_fit(tmp_path, capsys):
    for tensors, expected in [
        ({"ids": torch.zeros(3, 2), "scale": torch.zeros(4)}, "as many of each (ids: 3, scale: 4)"),
        ({"ids": torch.zeros(0, 2)}, "one sample or more along dim 0 is needed"),
        ({"scale": torch.zeros(4)}, "no tensor for forward's parameter 'ids'"),
        ({"ids": torch.zeros(())}, "(none)"),
    ]:
        save_file(tensors, tmp_path / "c.safetensors")
        command = ["quantize", "tied.safetensors", "--model", "cli_nets:Tied", "--calibration"]
        line = failure(capsys, [*command, tmp_path / "c.safetensors", "--out", tmp_path / "x"])
        assert expected in line


class Evil:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_a_pickle_that_needs_more_than_tensors_is_refused_and_not_run(work, tmp_path, capsys):
    torch.save({"w": Evil()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"w": Evil()}))
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)))
    (tmp_path / "cut.pt").write_bytes((work / "net.pt").read_bytes()[:5000])
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    command = ["--model", "cli_nets:make", "--out", tmp_path / "x"]
    assert "no safetensors file" in failure(capsys, ["quantize", tmp_path / "noise.pt", *command])
    for name in ("zip", "bare", "cut"):
        line = failure(capsys, ["quantize", tmp_path / f"{name}.pt", *command])
        assert "torch.load(weights_only=True) refuses it" in line and "Re-running" not in line
    assert "a state_dict is needed" in failure(capsys, ["quantize", tmp_path / "list.pt", *command])
    assert not (work / "unpickled").exists()


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"w": "../net.safetensors"}}, "'../net.safetensors'; that must be the name of a"),
        ({"weight_map": {"w": "/etc/passwd"}}, "in the same folder, without a path"),
        ({"weight_map": ["w"]}, "weight_map is ['w']"),
        ([], "the index starts with"),
        ({"weight_map": {"more": "a.safetensors"}}, "tensor 'more' is not in a.safetensors"),
        (None, "a folder needs model.safetensors, or model.safetensors.index.json"),
    ],
)
def test_a_folder_that_is_no_checkpoint(index, expected, tmp_path, capsys):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    command = ["quantize", tmp_path, "--model", "cli_nets:make", "--out", "x.safetensors"]
    assert expected in failure(capsys, command)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quantize", "a"], "quantize: the following arguments are required: --model, --out"),
        (["quantize", "a", "--bits", "four"], "quantize: argument --bits: invalid int value: 'four'"),
        (["quantize", "a", "--batch-size", "0"], "'0' is no whole number above 0"),
        (["quantize", "a", "--overrides", "int8"], "'int8' is not PATTERN=SCHEME"),
        (["inspect", "a", "--format", "xml"], "invalid choice: 'xml'"),
        (["inspect", "a", "--fail-below-db", "nan"], "'nan' is no finite number of dB"),
        (["compare", "a"], "compare: the following arguments are required: B"),
        (["inspect", "a", "--fail", "3"], "unrecognized arguments: --fail 3"),
        (["inspect", "a", "x\n\x1b[2J"], r"unrecognized arguments: x\n\x1b[2J"),
    ],
)
def test_bad_usage_is_one_line(arguments, expected, capsys):
    assert expected in usage(capsys, arguments)


def test_inspect_says_everything(capsys):
    lines = said(capsys, ["inspect", "calibrated.safetensors", "--tensors"]).out.splitlines()
    assert re.match(r"calibrated.safetensors: 1\d\.\d kB, 12 tensors, format version 1 \(mono_quant_fx ", lines[0])
    columns = [" ".join(line.split()) for line in lines]
    assert "int4 g32 sym 3 42.0 6.6" in columns and "3 default skip: LayerNorm" in columns
    assert "settings: group_size=32 (the others as by default)" in columns
    assert "0.weight_packed I32 64x16 4096" in columns
    assert any(line.startswith("total model output") for line in columns)


@pytest.mark.parametrize("style", FORMATS)
@pytest.mark.parametrize(
    "command", [["inspect", "plain.safetensors"], ["inspect", "net.safetensors"],
                ["compare", "plain.safetensors", "calibrated.safetensors"], ["verify", "plain.safetensors"]]
)  # fmt: skip
def test_formats(style, command, capsys):
    out, err = said(capsys, [*command, "--format", style])
    assert err == "" and out.endswith("\n") and not out.endswith("\n\n")
    if style == "json":
        assert isinstance(json.loads(out), dict)
    elif style == "csv":
        rows = list(csv.reader(io.StringIO(out)))
        assert len({len(row) for row in rows}) == 1 and len(rows) >= (1 if command[0] == "verify" else 5)
    elif style == "markdown":
        assert "|---" in out or command[0] == "verify"


def test_inspect_as_json_is_the_whole_header(work, capsys):
    data = json.loads(said(capsys, ["inspect", "calibrated.safetensors", "--format", "json"]).out)
    table = mq.load(work / "calibrated.safetensors", _skeleton()).accuracy
    assert [row["weight_sqnr_db"] for row in data["rows"]] == [row.weight_sqnr_db for row in table.rows]
    assert data["total"]["output_sqnr_db"] == table.output_sqnr_db and data["config"]["group_size"] == 32
    assert data["info"]["skipped_layers"] == {"3": "default skip: LayerNorm"}
    assert data["versions"]["mono_quant_fx"] == mq.__version__ and data["holds_graph"] is False
    assert {"name": "0.weight_packed", "dtype": "I32", "shape": [64, 16], "bytes": 4096} in data["tensors"]


def test_inspect_reads_no_data(work, tmp_path, capsys, monkeypatch):
    """A file of 1 GiB whose data is a hole."""
    header = {"w": {"dtype": "U8", "shape": [2**30], "data_offsets": [0, 2**30]}}
    with TensorFile(work / "plain.safetensors") as file:
        header["__metadata__"] = dict(file.metadata)
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 2**30)
    for name in ("tensor", "read", "digest", "span"):
        monkeypatch.delattr(TensorFile, name)
    before, began = _resident(), time.perf_counter()
    assert "1073.7 MB, 1 tensors" in said(capsys, ["inspect", path]).out
    said(capsys, ["compare", path, path])
    assert time.perf_counter() - began < 1 and _resident() - before < 2**24


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_compare_pairs_nodes_and_sorts_by_loss(capsys):
    data = json.loads(said(capsys, ["compare", "calibrated.safetensors", "plain.safetensors", "--format", "json"]).out)
    changes = [row["change_db"] for row in data["rows"]]
    known = [value for value in changes if value is not None]
    assert changes == [*sorted(known), *[None] * (len(changes) - len(known))] and len(known) == 3
    assert {row["figure"] for row in data["rows"]} == {"weight"} and data["output_change_db"] is None
    own = json.loads(said(capsys, ["compare", "plain.safetensors", "plain.safetensors", "--format", "json"]).out)
    assert {row["change_db"] for row in own["rows"]} == {0.0, None}


def row(module, scheme="int4 g32 sym", weight_db=20.0, local_db=None, **fields):
    name = module.replace(".", "_")
    return mq.AccuracyRow(name, "linear", module, f"{module}.weight", scheme, "", (8, 64), 2048, 300, weight_db,
                          local_db, **fields)  # fmt: skip


def test_differences():
    a = mq.AccuracyTable(
        (row("a"), row("b", local_db=30.0), row("c"), row("gone"), row("twice"), row("twice")), 30.0, 4
    )
    b = mq.AccuracyTable(
        (row("new"), row("c", "int8 channel", float("inf")), row("twice", weight_db=19.0), row("b", local_db=25.0),
         row("a", weight_db=float("nan")), row("twice")), 29.5, 4,
    )  # fmt: skip
    found = [(d.row.module, d.figures[0], d.change_db, d.note) for d in differences(a, b)]
    assert str(found[0][2]) == "nan" and found[0][0] == "a", "what is not known to be good comes first"
    assert found[1:] == [
        ("b", "local", -5.0, ""), ("twice", "weight", -1.0, ""), ("twice", "weight", 0.0, ""),
        ("c", "weight", float("inf"), "scheme changed"), ("gone", "weight", None, "only in A"),
        ("new", "weight", None, "only in B"),
    ]  # fmt: skip
    assert change(float("inf"), float("inf")) == 0 and change(None, 1.0) is None
    assert loss_verdict(a, b, None) is None and loss_verdict(a, b, 5.0) is None
    assert loss_verdict(a, b, 4.9) == "b lost 5.00 dB (local), more than 4.9 dB"
    assert loss_verdict(a, b, 0.4) == "the model output lost 0.50 dB, more than 0.4 dB"
    weights = [mq.AccuracyTable((row("a", weight_db=db),)) for db in (20.0, 18.0)]
    assert loss_verdict(*weights, 1.0) == "a lost 2.00 dB (weight), more than 1 dB"
    with pytest.raises(CommandError, match="no figure in common"):
        loss_verdict(weights[0], mq.AccuracyTable((row("z"),)), 1.0)


def test_compare_fails_on_loss(capsys):
    pair = ["compare", "plain.safetensors", "calibrated.safetensors"]
    out, err = said(capsys, [*pair, "--fail-loss-db", "0.1"], 1)
    assert "A: plain.safetensors" in out and re.search(r"lost \d\.\d\d dB \(weight\), more than 0.1 dB", err)
    said(capsys, [*pair, "--fail-loss-db", "60", "--fail-below-db", "5"])
    assert "the model output has" in said(capsys, [*pair, "--fail-below-db", "60"], 1).err


@pytest.mark.parametrize("command", ["inspect", "verify", "compare", "quantize"])
@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut", "pipe", "unreadable"])
def test_a_file_that_cannot_be_read(command, kind, work, tmp_path, capsys):
    path = tmp_path / f"{kind}.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "unreadable":
        path = Path("/proc/self/mem")
    elif kind != "missing":
        whole = (work / "plain.safetensors").read_bytes()
        path.write_bytes({"empty": b"", "text": b"not a file of tensors", "cut": whole[:-1]}[kind])
    more = {"compare": ["plain.safetensors"], "quantize": ["--model", "cli_nets:make", "--out", "none.safetensors"]}
    assert path.name in failure(capsys, [command, path, *more.get(command, [])])


def test_damaged_files_are_one_line(work, tmp_path, capsys):
    path = tmp_path / "mutant.safetensors"
    for kind, raw in mutants(tmp_path, 64):
        path.write_bytes(raw)
        for command in ("inspect", "verify"):
            capsys.readouterr()
            code = main([command, str(path)])
            out, err = capsys.readouterr()
            if command == "verify" or code:
                assert code == 2 and err.startswith(ERROR) and err.count("\n") == 1 and out == "", kind
            else:
                assert out and not err, kind


def changed(source: Path, path: Path, change, digests=True):
    """A copy of a file whose tensors (a dict) and header entry (a dict) `change` has changed; digests made anew."""
    with TensorFile(source) as file:
        about = json.loads(file.metadata[saving.KEY])
        tensors = {name: file.tensor(name).clone() for name in file.entries}
    change(tensors, about)
    if digests and saving.DIGESTS in tensors:
        del tensors[saving.DIGESTS]
        tensors[saving.DIGESTS] = torch.stack([saving.digest(t) for t in tensors.values()])
    entries = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with TensorWriter(path, entries, {saving.KEY: json.dumps(about)}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t, a: t["0.weight_scale"][0].fill_(float("nan")),
            ["'0.weight_scale' has 4 scales of 256 that are not finite"],
        ),
        (lambda t, a: t["0.weight_scale"][0].neg_(), ["'0.weight_scale' has 4 scales of 256 that are not positive"]),
        (lambda t, a: t["0.weight_scale"][0].fill_(1e-40), ["'0.weight_scale' has 4 scales of 256 that are subnormal"]),
        (
            lambda t, a: t.update({"0.weight_scale": t["0.weight_scale"][:, :3].contiguous()}),
            ["'0.weight_scale' is F32[64, 3] where the plan needs F32[64, 4]"],
        ),
        (
            lambda t, a: t.update({"0.weight_packed": t["0.weight_packed"].view(torch.uint8)}),
            ["'0.weight_packed' is U8[64, 64] where the plan needs I32[64, 16]"],
        ),
        (lambda t, a: t.pop("0.weight_packed"), ["'0.weight_packed' is missing; the plan stores weight '0.weight' so"]),
        (
            lambda t, a: t.update({"0.weight": torch.zeros(64, 128)}),
            ["'0.weight' is unknown; the plan stores this weight as codes, and here is a float tensor besides"],
        ),
        (
            lambda t, a: t.update({"0.weight_zero_point": torch.zeros(64, 4, dtype=torch.int8)}),
            ["'0.weight_zero_point' is unknown; no weight of the plan is stored so"],
        ),
        (lambda t, a: t.pop("2.weight"), ["'2.weight' is missing; the plan leaves it as it is"]),
        (
            lambda t, a: t.update({"2.weight": t["2.weight"].half()}),
            ["'2.weight' is F16[32, 64] where the plan has float32[32, 64]"],
        ),
        (
            lambda t, a: t.update({"3.weight": torch.zeros(9), "3.bias": torch.zeros(9)}),
            ["'3' has no tensor that is float32[32], as the plan has it"],
        ),
        (lambda t, a: a["plan"][0].update(layout="diagonal"), ["'0.weight' has layout 'diagonal' in the plan"]),
        (lambda t, a: a["plan"][0].update(groups=0), ["'0.weight' has 0 groups in the plan"]),
        (lambda t, a: a["plan"][0].update(shape=[-1, 0]), ["'0.weight' has shape [-1, 0] in the plan"]),
        (lambda t, a: a["plan"][0].update(shape=[]), ["'0.weight' has shape [] in the plan"]),
        (lambda t, a: a["plan"][0].update(dtype="__class__"), ["'0.weight' has dtype '__class__' in the plan"]),
        (lambda t, a: a["plan"][0].update(scheme=None), ["'0.weight' is lowered in the plan, and has no scheme"]),
        (lambda t, a: a["tied"].update(x="y"), ["'y' is missing; 'x' is tied to it"]),
        (lambda t, a: a["stacked"].update(x=["y"]), ["'y' is missing; 'x' is stacked from it"]),
        (
            lambda t, a: a["table"]["rows"][0].update(scheme="int8 channel"),
            ["'0.weight' is 'int8 channel' in the table and 'int4 g32 sym' in the plan"],
        ),
        (
            lambda t, a: t.pop(saving.DIGESTS),
            ["'mono_quant_fx.sha256' is missing; it holds a SHA-256 digest of each tensor"],
        ),
        (
            lambda t, a: (t["0.weight_scale"].neg_(), t.pop("2.bias"), t["2.weight_scale"].neg_()),
            ["'0.weight_scale' has 256 scales", "'2.weight_scale' has 64 scales of 64 that are not positive"],
        ),
    ],
)  # fmt: skip
def test_verify_names_every_fault(change, expected, work, tmp_path, capsys):
    source, count = ("skipped", 2) if expected[0].startswith("'2.weight' is") else ("plain", 3)
    path = changed(work / f"{source}.safetensors", tmp_path / "m.safetensors", change)
    out, err = said(capsys, ["verify", path], 2)
    lines = out.splitlines()
    assert len(lines) == len(expected) and all(a.startswith(b) for a, b in zip(lines, expected, strict=True)), out
    assert re.fullmatch(rf"{ERROR}.*: \d+ tensors, {count} quantized weights: {len(lines)} faults\n", err)
    data = json.loads(said(capsys, ["verify", path, "--format", "json"], 2).out)
    assert data["ok"] is False and len(data["problems"]) == len(expected)


def test_verify_finds_any_changed_byte_and_added_tensor(work, tmp_path, capsys):
    raw = (work / "calibrated.safetensors").read_bytes()
    with TensorFile(work / "calibrated.safetensors") as file:
        start = len(raw) - max(entry.stop for entry in file.entries.values())
        entries = list(file.entries.values())
    for entry in entries:
        damaged = bytearray(raw)
        damaged[start + entry.stop - 1] ^= 0x10
        (tmp_path / "m.safetensors").write_bytes(damaged)
        out = said(capsys, ["verify", tmp_path / "m.safetensors"], 2).out
        name = entries[-2].name if entry.name == saving.DIGESTS else entry.name
        assert f"'{name}' does not have the SHA-256 digest" in out
    path = changed(
        work / "plain.safetensors", tmp_path / "n.safetensors", lambda t, a: t.update(x=torch.zeros(1)), digests=False
    )
    assert "'mono_quant_fx.sha256' is U8[11, 32]; 12 tensors need U8[12, 32]" in said(capsys, ["verify", path], 2).out


def test_verify_looks_behind_the_last_column_and_at_zero_points(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(61, 32), nn.Linear(32, 32)).eval()
    settings = {"group_size": -1, "symmetric": False, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
    mq.quantize(model, **settings).save(tmp_path / "a.safetensors")
    said(capsys, ["verify", tmp_path / "a.safetensors"])

    def damage(tensors, about):
        tensors["0.weight_packed"][:5, -1] |= 1 << 20
        tensors["1.weight_zero_point"][:2] = 8

    path = changed(tmp_path / "a.safetensors", tmp_path / "b.safetensors", damage)
    assert said(capsys, ["verify", path], 2).out.splitlines() == [
        "'0.weight_packed' has 5 rows whose 3 unused codes behind the last column are not 0",
        "'1.weight_zero_point' has 2 zero points of 32 outside -8..7",
    ]


def test_verify_knows_every_tensor_of_a_file_with_its_graph(tmp_path, capsys):
    model = nn.ModuleDict({"q": nn.Linear(64, 32), "k": nn.Linear(64, 32)}).eval()
    model.forward = lambda x: model["q"](x) * model["k"](x)
    mq.quantize(model, torch.zeros(2, 64), accuracy_warning="ignore").save(tmp_path / "a.safetensors", graph=True)
    said(capsys, ["verify", tmp_path / "a.safetensors"])

    def damage(tensors, about):
        tensors["stray"] = torch.zeros(1)
        del tensors["k.bias"], tensors["q.weight_scale"]

    path = changed(tmp_path / "a.safetensors", tmp_path / "b.safetensors", damage)
    assert said(capsys, ["verify", path], 2).out.splitlines() == [
        "'q.weight_scale' is missing; the plan stores weight 'q.weight' so",
        "'k.bias' is missing; 'q_k.bias' is stacked from it",
        "'stray' is unknown; the graph in the file does not read it",
    ]


@pytest.mark.parametrize("model", ["make", "hollow_make", None])
def test_export(model, work, tmp_path, capsys):
    source = tmp_path / "own.safetensors"
    said(capsys, [*QUANTIZE, "--graph", "--out", source])
    said(capsys, ["verify", source])
    more = [] if model is None else ["--model", f"cli_nets:{model}"]
    printed = said(capsys, ["export", source, tmp_path / "out", *more]).out
    assert re.fullmatch(r"\S+/out/config.json: .*\n\S+/out/model.safetensors: 8\.\d kB\n", printed)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    with TensorFile(tmp_path / "out/model.safetensors") as a, TensorFile(source) as b:
        assert torch.equal(a.tensor("0.weight_packed"), b.tensor("0.weight_packed"))


def test_what_export_refuses(work, tmp_path, capsys):
    assert "holds no graph: pass the float model" in failure(capsys, ["export", "plain.safetensors", tmp_path / "out"])
    more = ["--model", "cli_nets:Tied"]
    assert "plan" in failure(capsys, ["export", "plain.safetensors", tmp_path / "out", *more])
    assert "this is a file" in failure(capsys, ["export", "plain.safetensors", "cli_nets.py"])
    assert not (tmp_path / "out").exists()


def test_names_in_a_file_do_not_steer_the_terminal(work, tmp_path, capsys):
    def hostile(tensors, about):
        tensors["\x1b[2J\n\u202e"] = torch.zeros(1)
        about["table"]["rows"][0]["node"] = "\x1b]0;owned\x07\nforged line"
        about["info"]["skipped_layers"]["\x1b[31m"] = "red\nline \ud800"
        about["info"]["warnings"] = ["\x1b[1m"]
        about["versions"]["\x1b"] = "\x1b"

    path = changed(work / "plain.safetensors", tmp_path / "m.safetensors", hostile)
    for style in FORMATS:
        for command in (["inspect", path, "--tensors"], ["compare", path, path], ["verify", path]):
            capsys.readouterr()
            main([*map(str, command), "--format", style])
            text = "".join(capsys.readouterr())
            assert all(c.isprintable() or c == "\n" for c in text) and "\nforged" not in text, command


def test_a_header_of_absurd_figures_is_one_line(work, tmp_path, capsys):
    def absurd(tensors, about):
        about["table"]["rows"][0]["bytes_before"] = 10**400

    path = changed(work / "plain.safetensors", tmp_path / "m.safetensors", absurd)
    assert failure(capsys, ["inspect", path]).startswith("OverflowError")


def test_an_interrupt_is_130_and_a_traceback_is_shown_on_demand(capsys, tmp_path):
    command = ["quantize", "net.safetensors", "--out", tmp_path / "x", "--model"]
    assert failure(capsys, [*command, "cli_nets:interrupts"], 130) == "interrupted"
    err = said(capsys, [*command, "cli_nets:fails", "--traceback"], 2).err
    assert "Traceback" in err and 'raise ValueError("no such' in err


def process(*arguments, **options):
    """A run of its own, as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mono_quant_fx", *map(str, arguments)]
    return subprocess.run(command, env=environment, text=True, timeout=120, **options)


def test_a_process_of_its_own(work, tmp_path):
    done = process(
        *QUANTIZE, "--calibration", "inputs.safetensors", "--num-calibration-samples", "9", "--skip", "2", "4",
        "--out", tmp_path / "x.safetensors", cwd=work, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("node "), done.stderr
    cut = "Calibration data: 9 of 64 samples used (num_calibration_samples=9)"
    few = "Few calibration samples: 9 < 50; the measured figures may not hold on other data"
    said = [f"mono-quant-fx: warning: {text}" for text in (cut, few)]
    assert done.stderr.splitlines() == ["the factory's own words", *said]


def test_a_closed_pipe_and_a_full_disk(work):
    if not Path("/dev/full").exists():
        pytest.fail("these tests run on Linux")
    with open("/dev/full", "w") as full:
        done = process("inspect", "plain.safetensors", cwd=work, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, f"{ERROR}No space left on device\n")
    end, out = os.pipe()
    os.close(end)
    done = process("inspect", "plain.safetensors", cwd=work, stdout=out, stderr=subprocess.PIPE)
    os.close(out)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_the_console_script_is_this_main():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^\[project.scripts\]\nmono-quant-fx = "mono_quant_fx.cli.main:main"$', text, re.MULTILINE)
    assert cli.main is main


def test_printable():
    assert printable("größe 3") == "größe 3" and printable("\t\x9b\ud800") == r"\t\x9b\ud800"


def test_the_page_shows_what_its_commands_print(tmp_path, monkeypatch, capsys):
    """Each `$ mono-quant-fx` line, in order; "..." stands for the lines before those shown."""
    page = "docs/command_line.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    count, codes = 0, []
    for block in blocks(read(page)):
        if block.language == "python":
            run(page, block, {})
        elif block.text.startswith("$ "):
            command, _, expected = block.text.removeprefix("$ ").partition("\n")
            program, *arguments = shlex.split(command)
            assert program == "mono-quant-fx"
            capsys.readouterr()
            codes.append(main(arguments))
            actual = stripped("".join(capsys.readouterr()))
            shown, count = stripped(expected), count + 1
            if shown.startswith("...\n"):
                assert actual.endswith("\n" + shown.removeprefix("...\n")), actual
            else:
                assert shown in ("", actual), actual
    monkeypatch.delitem(sys.modules, "net", raising=False)
    assert codes == [0, 0, 0, 0, 0, 0, 1]
