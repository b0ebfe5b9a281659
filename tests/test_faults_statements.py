"""What a file or folder says twice is compared: refused with both statements, or followed by a rule of the docs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.cli.main import main
from mono_quant_fx.files.reader import TensorFile, write_tensors
from mono_quant_fx.interop.packing import pack_zero_points
from mono_quant_fx.storage.saving import KEY
from tests.checkpoint_models import IDS, skeleton
from tests.test_import_compressed_tensors import export, foreign_folder, put, reconfigure, rewrite

LINEARS = ("up", "gate", "down")
MIDDLE = {"gptq": 0x77777777, "gptq_v2": -0x77777778}


def load(folder: Path) -> Any:
    return mq.import_compressed_tensors(folder, skeleton())


def refused(folder: Path, *words: str) -> None:
    """Both statements, and a way out, are in the error."""
    with pytest.raises(mq.CheckpointError) as error:
        load(folder)
    said = str(error.value)
    assert all(word in said for word in words) and str(folder) in said, said


# ------------------------------------------------------------------ GPTQ and AWQ


def with_zeros(word: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [tensors[f"{name}.qzeros"].fill_(word) for name in LINEARS] and None


@pytest.mark.parametrize("sym", [{"sym": True}, {}])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
def test_zero_points_of_the_other_convention_are_refused(said, sym, tmp_path):
    """`"sym": true` with v2 zeros labelled v1: every weight was off by one step, in silence."""
    stored = "gptq" if said == "gptq_v2" else "gptq_v2"
    foreign_folder(tmp_path, "gptq", checkpoint_format=said, **sym)
    rewrite(tmp_path, with_zeros(MIDDLE[stored]))
    refused(tmp_path, "'up.qzeros'", f"checkpoint_format '{said}'", f"correct checkpoint_format to '{stored}'")
    reconfigure(tmp_path, lambda c: c.update(checkpoint_format=stored))
    assert {str(a.scheme) for a in annotations(load(tmp_path))} == {"int4 g32 sym"}
    reconfigure(tmp_path, lambda c: c.update(checkpoint_format=said, sym=False))  # meant so
    assert {str(a.scheme) for a in annotations(load(tmp_path))} == {"int4 g32 asym"}


def annotations(gm: Any) -> list[Any]:
    return [n.meta[k] for n in gm.graph.nodes for k in n.meta if type(n.meta[k]).__name__ == "QuantAnnotation"
            and n.meta[k].lowered]  # fmt: skip


GPTQ: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "sym": ({"sym": True}, None, ("'up.qzeros'", "zero points are 0 .. 15", "sym true, which is 7 everywhere")),
    "sym v2": ({"sym": True, "checkpoint_format": "gptq_v2"}, None, ("0 .. 15", "which is 8 everywhere")),
    "bits": ({"bits": 8}, None, ("'up.qweight'", "hold codes of 4 bits", "says bits 8")),
    "group_size": ({"group_size": 64}, None, ("'up.scales'", "it has 2 groups of 64 columns", "group_size 64")),
    "all columns": ({"group_size": -1}, None, ("'up.scales'", "2 groups of 64 columns", "group_size -1")),
    "no g_idx": ({"desc_act": True}, lambda t: t.pop("up.g_idx"), ("'up.g_idx': it is missing", "desc_act true")),
    "g_idx": (
        {"desc_act": False},
        put("up.g_idx", torch.arange(64, dtype=torch.int32).flip(0) // 32),
        ("'up.g_idx'", "do not stand in order", "desc_act false"),
    ),
    "two names": ({"w_bit": 8}, None, ("bits 4 and w_bit 8 mean the same and differ",)),
    "no switch": ({"sym": "yes"}, None, ("sym 'yes': true or false is needed",)),
}


@pytest.mark.parametrize("name", GPTQ)
def test_gptq_config_and_tensors(name, tmp_path):
    config, change, words = GPTQ[name]
    foreign_folder(tmp_path, "gptq", checkpoint_format=config.get("checkpoint_format", "gptq"))
    reconfigure(tmp_path, lambda c: c.update(config))
    if change is not None:
        rewrite(tmp_path, change)
    refused(tmp_path, *words)


def test_awq_without_zero_points(tmp_path):
    foreign_folder(tmp_path, "awq", version="gemm", zero_point=False)
    refused(tmp_path, "'up.qzeros'", "the zero points are 0 .. 15 and not all 8", "zero_point false")
    rewrite(tmp_path, with_zeros(MIDDLE["gptq_v2"]))
    assert {str(a.scheme) for a in annotations(load(tmp_path))} == {"int4 g32 sym"}


def test_two_config_files_of_one_folder(tmp_path):
    foreign_folder(tmp_path, "gptq", sym=False)
    side = tmp_path / "quantize_config.json"
    side.write_text(json.dumps({"bits": 4, "group_size": 32, "sym": False}))
    load(tmp_path)
    side.write_text(json.dumps({"bits": 4, "group_size": 32, "sym": True}))
    refused(tmp_path, "config.json: sym False", "quantize_config.json: True")


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_without_a_value_are_refused(form, value, tmp_path):
    """Imported checkpoints with NaN or inf scales were accepted."""
    if form in ("gptq", "awq"):
        foreign_folder(tmp_path, form)
        rewrite(tmp_path, lambda t: t["up.scales"][0, :3].fill_(value))
    else:
        export(tmp_path, **({"bits": 8} if form == "int8" else {"group_size": 32}))
        rewrite(tmp_path, lambda t: t["up.weight_scale"][:3, 0].fill_(value))
    refused(tmp_path, "scale", "3 of ", "scales are NaN or infinite", "download the file again")


# ------------------------------------------------------------------ compressed-tensors


def weights(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)


def all_zero(rows: int, groups: int) -> torch.Tensor:
    return pack_zero_points(torch.zeros(rows, groups, dtype=torch.int8))


COMPRESSED: dict[str, tuple[dict[str, Any], Any, Any, tuple[str, ...]]] = {
    "symmetric": (
        {"group_size": 32, "symmetric": False}, weights(symmetric=True), None,
        ("weight_zero_point'", "zero points are not 0", "symmetric true (group_0)"),
    ),
    "group_size": ({"group_size": 32}, weights(group_size=64), None, ("up.weight_scale: 2 groups", "group_size 64")),
    "channel": ({"group_size": 32}, weights(strategy="channel", group_size=None), None, ("strategy 'channel'",)),
    "itself": ({"group_size": 32}, weights(strategy="channel"), None, ("'channel' and group_size 32 contradict",)),
    "no size": ({"group_size": 32}, weights(group_size=None), None, ("'group' and group_size None contradict",)),
    "num_bits": ({"group_size": 32}, weights(num_bits=8), None, ("words a row hold 64 codes of 4 bits", "num_bits 8")),
    "int8 bits": ({"bits": 8}, weights(num_bits=4), None, ("a code a byte", "num_bits 4 (group_0)")),
    "format": (
        {"bits": 8}, lambda c: (c.update(format="pack-quantized"), c["config_groups"]["group_0"].pop("format")), None,
        ("it has a byte for each code", "format 'pack-quantized'"),
    ),
    "ignored": ({"group_size": 32}, lambda c: c["ignore"].append("up"), None, ("it is quantized", "ignore 'up'")),
    "ignored re": ({"group_size": 32}, lambda c: c["ignore"].append("re:u."), None, ("it is quantized", "ignore 'up'")),
    "actorder": ({"group_size": 32}, weights(actorder="group"), None, ("g_idx': it is missing", "actorder 'group'")),
    "strategy": ({"bits": 8}, weights(strategy="tensor"), None, ("weight_scale'", "128 scales", "strategy 'tensor'")),
    "int8 symmetric": (
        {"bits": 8, "symmetric": False}, weights(symmetric=True), None,
        ("weight_zero_point'", "symmetric true (group_0)"),
    ),
    "pattern": ({"group_size": 32}, lambda c: c["ignore"].append("re:("), None, ("'re:(' is no regular expression",)),
    "shape": ({"group_size": 32}, None, put("up.weight_shape", torch.tensor([64, 128])), ("it says [64, 128]",)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_config_and_tensors(name, tmp_path):
    options, config, change, words = COMPRESSED[name]
    export(tmp_path, **options)
    if config is not None:
        reconfigure(tmp_path, config)
    if change is not None:
        rewrite(tmp_path, change)
    refused(tmp_path, *words)


def test_zero_points_that_are_zero_may_stand_beside_symmetric_and_be_missing_beside_asymmetric(tmp_path):
    """Old versions of the package left out zero points that are 0 everywhere; others wrote them all the same."""
    result = export(tmp_path, group_size=32)
    expected = result.graph_module(IDS)
    for packed in (False, True):
        rewrite(tmp_path, lambda t, packed=packed: t.update(
            {f"{n}.weight_zero_point": all_zero(*t[f"{n}.weight_scale"].shape) if packed
             else torch.zeros(t[f"{n}.weight_scale"].shape, dtype=torch.int8) for n in LINEARS}))  # fmt: skip
        assert torch.equal(load(tmp_path)(IDS), expected)
    rewrite(tmp_path, lambda t: [t.pop(f"{n}.weight_zero_point") for n in LINEARS])
    reconfigure(tmp_path, weights(symmetric=False))
    assert torch.equal(load(tmp_path)(IDS), expected)
    reconfigure(tmp_path, lambda c: c["config_groups"]["group_0"]["weights"].pop("symmetric"))
    assert torch.equal(load(tmp_path)(IDS), expected)


def test_a_group_is_found_by_name_before_pattern_before_class(tmp_path):
    result = export(tmp_path, group_size=32)

    def more(config: dict[str, Any]) -> None:
        group = config["config_groups"]["group_0"]
        other = json.loads(json.dumps(group))
        other["weights"].update(num_bits=8, group_size=None, strategy="channel")
        config["config_groups"] = {
            "a": {**other, "targets": ["Linear"]},
            "b": {**group, "targets": ["re:(up|gate)"]},
            "c": {**other, "targets": ["re:d"]},
            "d": {**group, "targets": ["down"]},
        }

    reconfigure(tmp_path, more)
    assert torch.equal(load(tmp_path)(IDS), result.graph_module(IDS))
    reconfigure(tmp_path, lambda c: c["config_groups"].pop("d"))
    refused(tmp_path, "'down.weight_packed'", "hold 128 codes of 4 bits", "num_bits 8 (c)")


INPUT = {"bits": 8, "calibration_data": [IDS], "activations": "int8", "algorithm": "rtn"}
INPUTS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "missing": (None, lambda t: t.pop("down.input_scale"), ("'down.input_scale': it is missing", "static")),
    "nan": (None, lambda t: t["down.input_scale"].fill_(float("nan")), ("scales are NaN or infinite",)),
    "zero": (None, lambda t: t["down.input_scale"].fill_(0), ("a scale of 0.0; one above 0",)),
    "symmetric": (
        lambda c: c["config_groups"]["group_0"]["input_activations"].update(symmetric=True), None,
        ("input_zero_point'", "symmetric true (group_0)"),
    ),
    "unknown": (lambda c: c["config_groups"]["group_0"].update(input_activations=None), None, ("has no place",)),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_static_inputs_and_their_scales(name, tmp_path):
    config, change, words = INPUTS[name]
    export(tmp_path, **INPUT)
    if config is not None:
        reconfigure(tmp_path, config)
    if change is not None:
        rewrite(tmp_path, change)
    refused(tmp_path, *words)


# ------------------------------------------------------------------ files of our own


def change_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with TensorFile(path) as file:
        about = json.loads(file.metadata[KEY])
        tensors = {name: file.read(name) for name in file.entries}
    change(about)
    write_tensors(path, tensors, {"format": "pt", KEY: json.dumps(about)})


def call(about: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in about["graph"]["graph"]["nodes"] if "int4_linear" in str(n.get("target")))


def rescheme(entry: dict[str, Any], size: int) -> None:
    entry["scheme"]["group_size"] = size


OWN: dict[str, tuple[Any, str]] = {
    "plan": (lambda h: rescheme(h["plan"][0], 40), "'int4 g32 sym' in the table and 'int4 g40 sym' in the plan"),
    "table": (lambda h: h["table"]["rows"][0].update(scheme="int4 g64 sym"), "'int4 g64 sym' in the table"),
    "row": (lambda h: h["table"].update(rows=[]), "in the plan and has no row in the table"),
    "graph": (lambda h: call(h)["args"].__setitem__(5, 40), "in groups of 40, and the plan has int4 g32 sym"),
    "annotation": (
        lambda h: rescheme(next(n for n in h["graph"]["graph"]["nodes"] if "annotation" in n)["annotation"], 40),
        "has scheme 'int4 g32 sym' in the plan and 'int4 g40 sym' in the graph",
    ),
    "scale": (lambda h: call(h)["args"].__setitem__(2, call(h)["args"][4]), "weight_scale '0.bias'"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_plan_table_and_graph_of_a_file_agree(name, tmp_path, capsys):
    """96 columns are 3 groups of 32 or of 40: the plan's word was taken, whatever table and graph said."""
    change, words = OWN[name]
    path = tmp_path / "a.safetensors"
    model = nn.Sequential(nn.Linear(96, 64)).eval()
    mq.quantize(model, group_size=32).save(path, graph=True)
    mq.load(path)
    change_header(path, change)
    with pytest.raises(mq.FileFormatError, match=r"weight '0\.weight'") as error:
        mq.load(path)
    assert words in str(error.value)
    assert main(["verify", str(path)]) == 2
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_wrappers_are_taken_out_of_the_names_of_a_folder(form, prefix, tmp_path):
    """A checkpoint of a compiled or parallel model was refused as one of another model."""
    _ = export(tmp_path, group_size=32) if form != "gptq" else foreign_folder(tmp_path, "gptq")
    expected = load(tmp_path)(IDS)

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    rewrite(tmp_path, wrap)
    assert torch.equal(load(tmp_path)(IDS), expected)
