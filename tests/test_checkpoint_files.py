"""Folders of files: what is refused, and what a failure leaves behind."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.files import checkpoint_files
from mono_quant_fx.files.checkpoint_files import INDEX, SINGLE, Checkpoint, write_checkpoint
from tests.checkpoint_models import Model, skeleton

TENSORS = {"a": torch.ones(4), "b": torch.zeros(100), "c": torch.arange(6).view(2, 3)[:, 1:]}


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_files_are_cut_by_size_and_read_back(tmp_path):
    write_checkpoint(tmp_path / "x", TENSORS, {"k": 1}, shard_bytes=300)
    names = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert names == ["config.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 16 + 400 + 32}
    found = Checkpoint(tmp_path / "x")
    assert all(torch.equal(found.get(n), t) and found.kind(n) == (t.dtype, tuple(t.shape)) for n, t in TENSORS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_one_file_after_several_is_refused_and_after_one_replaces_it(tmp_path):
    write_checkpoint(tmp_path, TENSORS, {}, shard_bytes=300)
    with pytest.raises(mq.CheckpointError, match=r"model-00001-of-00003.safetensors: readers would take it"):
        write_checkpoint(tmp_path, TENSORS, {}, shard_bytes=10**9)
    for file in tmp_path.glob("model-*.safetensors"):
        file.unlink()
    write_checkpoint(tmp_path, TENSORS, {}, shard_bytes=10**9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    write_checkpoint(folder, TENSORS, {"old": True}, shard_bytes=10**9)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_files, "write_tensors", full)
    with pytest.raises(mq.CheckpointError, match="cannot be written: No space left"):
        write_checkpoint(folder, {"a": torch.zeros(2)}, {"new": True}, shard_bytes=10**9)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/etc/passwd.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "w.bin",
        7,
        "x\0.safetensors",
    ],
)
def test_an_index_names_plain_files_only(name, tmp_path):
    save_file(TENSORS | {"c": torch.ones(1)}, tmp_path / "evil.safetensors")
    (tmp_path / "in").mkdir()
    write_index(tmp_path / "in", {"a": name})
    with pytest.raises(mq.CheckpointError, match="the plain name of a"):
        Checkpoint(tmp_path / "in")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(mq.CheckpointError, match=r"a pickle can run any code while it is read, so it is refused"):
        Checkpoint(tmp_path)


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(mq.CheckpointError, match=r"a folder with model.safetensors or"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(mq.CheckpointError, match="the folder holds nothing"):
        Checkpoint(tmp_path)
    write_index(tmp_path, {"a": "m.safetensors"})
    with pytest.raises(mq.CheckpointError, match=r"m.safetensors cannot be read as safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(mq.CheckpointError, match=r"m.safetensors cannot be read as safetensors"):
        Checkpoint(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(mq.CheckpointError, match=r"'a' is not in m.safetensors, where the index puts it"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '{"weight_map": []}', "{}", "[" * 10**5, '"' * 3])
def test_json_that_is_none(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(mq.CheckpointError, match=INDEX):
        Checkpoint(tmp_path)


def test_json_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "MOST_JSON", 100)
    (tmp_path / INDEX).write_text("{" + " " * 200)
    with pytest.raises(mq.CheckpointError, match="more than 100 bytes of JSON are not read"):
        Checkpoint(tmp_path)


def test_a_truncated_file_and_a_float_one(tmp_path):
    mq.export_compressed_tensors(mq.quantize(Model(), group_size=32), tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-100])
    with pytest.raises(mq.CheckpointError, match="cannot be read as safetensors"):
        mq.import_compressed_tensors(tmp_path, skeleton())
    (tmp_path / SINGLE).write_bytes(whole)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(mq.CheckpointError, match="a quantization_config is needed; this checkpoint is not quantized"):
        mq.import_compressed_tensors(tmp_path, skeleton())


def test_an_export_updates_the_config_that_is_there(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": {"old": 1}}))
    mq.export_compressed_tensors(mq.quantize(Model(), group_size=32, modules_to_not_convert=["gate"]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "x"
    quantization = config["quantization_config"]
    assert quantization["format"] == "pack-quantized" and "old" not in quantization
    assert quantization["ignore"] == ["embed", "head", "gate"]
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["weights"]["group_size"] == 32
    names = {n: (t.dtype, tuple(t.shape)) for n, t in load_file(tmp_path / SINGLE).items()}
    assert names["up.weight_packed"] == (torch.int32, (128, 8)) and names["up.bias"] == (torch.float32, (128,))
    assert "head.weight" not in names and "embed.weight" in names and "shift" not in names


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.w = nn.Parameter(torch.randn(64, 64))
        self.proj = nn.Module()
        self.proj.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return torch.nn.functional.linear(self.linear(x) @ self.w, self.proj.weight)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Conv2d(8, 64, 3)), {}, "'0.weight' has 4 dimensions, as a convolution's"),
        (Functional(), {"modules_to_not_convert": ["proj"]}, "'w' is not the weight of a submodule"),
        (Functional(), {"modules_to_not_convert": ["w"]}, "'proj.weight' belongs to no nn.Linear or nn.Embedding"),
        (nn.Linear(64, 64), {}, "'weight' is not the weight of a submodule"),
        (Shared(), {}, "'a.weight' is used by b as well"),
    ],
)
def test_what_the_format_has_no_form_for(model, options, message, tmp_path):
    result = mq.quantize(model.eval(), group_size=32, skip_param_threshold=0, short_row="shrink", **options)
    with pytest.raises(mq.CheckpointError, match=message) as error:
        mq.export_compressed_tensors(result, tmp_path / "x")
    assert "modules_to_not_convert" in str(error.value) and not os.listdir(tmp_path)


def test_a_transposed_weight_has_no_form(tmp_path):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1d = nn.Module()
            self.conv1d.weight = nn.Parameter(torch.randn(64, 32))

        def forward(self, x):
            return x @ self.conv1d.weight

    result = mq.quantize(Transposed().eval(), group_size=32)
    with pytest.raises(mq.CheckpointError, match=r"is stored \[in, out\] \(as in GPT-2's Conv1D\)"):
        mq.export_compressed_tensors(result, tmp_path)


def test_a_graph_without_codes_and_bad_sizes(tmp_path):
    with pytest.raises(mq.PreconditionError, match="a QuantizationResult, or its graph_module, is needed"):
        mq.export_compressed_tensors(mq.capture(Model()), tmp_path)
    with pytest.raises(mq.ConfigError, match="shard_bytes=0: a whole number >= 1 is needed"):
        mq.export_compressed_tensors(mq.quantize(Model(), group_size=32), tmp_path, shard_bytes=0)


def test_int8_inputs_of_a_convolution_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 64)).eval()
    result = mq.quantize(
        model, calibration_data=[torch.randn(2, 8, 4, 4)], activations="int8", bits=8, skip_param_threshold=0
    )
    with pytest.raises(mq.CheckpointError, match=r"'0.weight' has 4 dimensions"):
        mq.export_compressed_tensors(result, tmp_path)
