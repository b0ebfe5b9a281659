"""Checkpoints in three formats, read back: the codes bit for bit, no float weight, and clean errors."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.files.checkpoint_files import Checkpoint
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.interop import packing
from mono_quant_fx.interop.foreign_weight import Reader, Wanted
from mono_quant_fx.numerics import affine
from tests.checkpoint_models import IDS, Model, skeleton

law = settings(deadline=None, derandomize=True, max_examples=40)


SETTINGS = {
    "g32": {"group_size": 32},
    "asym": {"group_size": 64, "symmetric": False},
    "channel": {"group_size": -1},
    "int8": {"bits": 8},
    "mixed": {"group_size": 32, "overrides": {"down": "int8 asym", "up": "int4 g64 asym"}},
}


def export(folder, **options):
    kind = {"dtype": options.pop("dtype")} if "dtype" in options else {}
    shard_bytes = options.pop("shard_bytes", 5 * 10**9)
    result = mq.quantize(Model(**kind), skip_param_threshold=0, **options)
    mq.export_compressed_tensors(result, folder, shard_bytes=shard_bytes)
    return result


def rewrite(folder, change):
    """Changes the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_round_trip_is_bitwise(options, dtype, tmp_path):
    result = export(tmp_path, dtype=dtype, shard_bytes=8_000, **options)
    assert (tmp_path / "model.safetensors.index.json").exists()
    gm = mq.import_compressed_tensors(tmp_path, skeleton(dtype))
    ours, theirs = result.graph_module.state_dict(), gm.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert torch.equal(gm(IDS), result.graph_module(IDS))
    assert [(a.weight, a.scheme) for _, a in annotated(gm)] == [
        (a.weight, a.scheme) for _, a in annotated(result.graph_module)
    ]


def test_exported_again_the_files_are_the_same(tmp_path):
    export(tmp_path / "a", group_size=32, symmetric=False)
    mq.export_compressed_tensors(mq.import_compressed_tensors(tmp_path / "a", skeleton()), tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_static_inputs_come_back(bits, tmp_path):
    result = export(
        tmp_path, bits=bits, group_size=32, calibration_data=[IDS], activations="int8", algorithm="rtn",
        activation_symmetric=bits == 4,
    )  # fmt: skip
    gm = mq.import_compressed_tensors(tmp_path, skeleton(), IDS)
    assert torch.equal(gm(IDS), result.graph_module(IDS))
    assert gm.code == result.graph_module.code
    rewrite(tmp_path, lambda t: t["gate.input_scale"].mul_(2))
    with pytest.raises(mq.CheckpointError, match="read one tensor with different input scales"):
        mq.import_compressed_tensors(tmp_path, skeleton(), IDS)


def test_an_example_on_the_cpu_captures_a_skeleton_by_export(tmp_path):
    class Branching(Model):
        def forward(self, ids):
            if ids.shape[0] > 10**6:
                return self.embed(ids)
            positions = torch.arange(ids.shape[1], device=ids.device)
            return super().forward(ids) + positions[:, None]

    result = mq.quantize(Branching().eval(), IDS, group_size=32, skip_param_threshold=0)
    mq.export_compressed_tensors(result, tmp_path)
    model = skeleton()
    model.__class__ = Branching
    gm = mq.import_compressed_tensors(tmp_path, model, IDS)
    assert all(t.device.type == "cpu" for t in gm.state_dict().values())
    assert torch.equal(gm(IDS[:1, :5]), result.graph_module(IDS[:1, :5]))
    assert all(p.is_meta for p in model.parameters())


def test_no_float_weight_is_made(tmp_path, monkeypatch):
    export(tmp_path, group_size=32)
    monkeypatch.setattr(affine, "dequantize_weight", None)
    monkeypatch.setattr(affine, "quantize_matrix", None)
    gm = mq.import_compressed_tensors(tmp_path, skeleton())
    floats = {n for n, t in gm.state_dict().items() if t.is_floating_point() and t.dim() == 2 and "scale" not in n}
    assert floats == {"embed.weight"}


def test_a_model_with_values_is_not_touched(tmp_path):
    export(tmp_path, group_size=32)
    model = Model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gm = mq.import_compressed_tensors(tmp_path, model, merge_linears=False)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert "up.weight_packed" in gm.state_dict() and not any(p.requires_grad for p in gm.parameters())


def test_eight_bits_in_words(tmp_path):
    """The package packs INT8 weights into int32 where inputs stay float, and the name of the format says which."""
    result = export(tmp_path, bits=8)

    def pack(tensors):
        for name in ("up", "gate", "down"):
            codes = tensors.pop(f"{name}.weight")
            tensors[f"{name}.weight_packed"] = (codes.view(torch.uint8) ^ 128).view(torch.int32)
            tensors[f"{name}.weight_shape"] = torch.tensor(codes.shape)

    rewrite(tmp_path, pack)
    reconfigure(tmp_path, lambda c: (c.update(format="pack-quantized"), c["config_groups"]["group_0"].pop("format")))
    gm = mq.import_compressed_tensors(tmp_path, skeleton())
    assert torch.equal(gm(IDS), result.graph_module(IDS))


def published_gptq(qweight, qzeros, scales, g_idx, bits, offset):
    """The format's dequantization in numpy: w[k, n] = scale[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])."""
    per, mask = 32 // bits, (1 << bits) - 1
    words, zeros = qweight.numpy().view(np.uint32), qzeros.numpy().view(np.uint32)
    k, n = words.shape[0] * per, words.shape[1]
    codes = np.array([[words[i // per, j] >> (bits * (i % per)) & mask for j in range(n)] for i in range(k)])
    zero = np.array([[zeros[g, j // per] >> (bits * (j % per)) & mask for j in range(n)] for g in range(len(zeros))])
    zero = (zero.astype(np.int64) + offset) & mask
    index = g_idx.numpy()
    return torch.from_numpy(scales.numpy()[index] * (codes.astype(np.int64) - zero[index]).astype(np.float32))


def published_awq(qweight, qzeros, scales):
    """The same for AWQ: nibble i of a word holds column (0 2 4 6 1 3 5 7)[i]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def unpack(words):
        out = np.zeros((words.shape[0], words.shape[1] * 8), np.int64)
        for j in range(words.shape[1]):
            for i in range(8):
                out[:, 8 * j + order[i]] = words.numpy().view(np.uint32)[:, j] >> (4 * i) & 15
        return out

    codes, zero = unpack(qweight), unpack(qzeros)
    group = codes.shape[0] // zero.shape[0]
    return torch.from_numpy(scales.numpy().repeat(group, 0) * (codes - zero.repeat(group, 0)).astype(np.float32))


def words(generator, *shape):
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


shapes = {"n8": st.integers(1, 4), "groups": st.integers(1, 4), "size8": st.integers(1, 4), "seed": st.integers(0, 999)}


@law
@given(**shapes, bits=st.sampled_from([4, 8]), offset=st.sampled_from([0, 1]), shuffled=st.booleans())
def test_gptq_words_mean_what_the_format_says(n8, groups, size8, seed, bits, offset, shuffled):
    generator = torch.Generator().manual_seed(seed)
    n, groups, size = 8 * n8, groups if bits == 4 else 1, 8 * size8
    k, per = groups * size, 32 // bits
    qweight, qzeros = words(generator, k // per, n), words(generator, groups, n // per)
    scales = torch.rand(groups, n, generator=generator)
    runs = torch.randperm(groups, generator=generator) if shuffled else torch.arange(groups)
    g_idx = runs.repeat_interleave(size).to(torch.int32)
    order = packing.group_order(g_idx, groups)
    assert torch.equal(order, runs)
    stored = packing.from_gptq(qweight, qzeros, scales, order if shuffled else None, bits, offset)
    ours = affine.dequantize_weight(stored, size if bits == 4 else -1, k)
    assert torch.equal(ours, published_gptq(qweight, qzeros, scales, g_idx, bits, offset).t())


@law
@given(**shapes)
def test_awq_words_mean_what_the_format_says(n8, groups, size8, seed):
    generator = torch.Generator().manual_seed(seed)
    n, k = 8 * n8, groups * size8 * 8
    qweight, qzeros = words(generator, k, n // 8), words(generator, groups, n // 8)
    scales = torch.rand(groups, n, generator=generator)
    stored = packing.from_awq(qweight, qzeros, scales)
    assert torch.equal(affine.dequantize_weight(stored, size8 * 8, k), published_awq(qweight, qzeros, scales).t())


@law
@given(n=st.integers(1, 40), groups=st.integers(1, 5), seed=st.integers(0, 999))
def test_zero_points_pack_and_unpack(n, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    zero = torch.randint(-8, 8, (n, groups), generator=generator).to(torch.int8)
    packed = packing.pack_zero_points(zero)
    assert packed.shape == (-(-n // 8), groups) and packed.dtype == torch.int32
    assert torch.equal(packing.unpack_zero_points(packed, n), zero)


def foreign_folder(folder, method, group_size=32, **config):
    """A checkpoint of Model in GPTQ's or AWQ's format with random codes; its linears' float weights by module."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    model = Model()
    tensors = {n: t for n, t in model.state_dict().items() if n != "head.weight"}
    floats = {}
    for name in ("up", "gate", "down"):
        n, k = model.get_submodule(name).weight.shape
        groups = k // group_size
        packed = (k // 8, n) if method == "gptq" else (k, n // 8)
        qweight, qzeros = words(generator, *packed), words(generator, groups, n // 8)
        scales = torch.rand(groups, n, generator=generator) / 50
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.qweight": qweight, f"{name}.qzeros": qzeros, f"{name}.scales": scales}
        if method == "gptq":
            g_idx = (torch.arange(k) // group_size).to(torch.int32)
            tensors |= {f"{name}.g_idx": g_idx}
            offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            floats[name] = published_gptq(qweight, qzeros, scales, g_idx, 4, offset).t()
        else:
            floats[name] = published_awq(qweight, qzeros, scales).t()
    tensors.setdefault("down.bias", torch.zeros(64))  # AutoGPTQ writes one for every layer
    save_file(tensors, folder / "model.safetensors")
    quant = {"quant_method": method, "bits": 4, "group_size": group_size, **config}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quant}))
    return floats


@pytest.mark.parametrize(
    ("method", "config"),
    [("gptq", {}), ("gptq", {"checkpoint_format": "gptq_v2"}), ("awq", {"version": "gemm", "zero_point": True})],
)
def test_gptq_and_awq_folders(method, config, tmp_path):
    floats = foreign_folder(tmp_path, method, **config)
    gm = mq.import_compressed_tensors(tmp_path, skeleton())
    found = mq.dequantize_model(gm).state_dict()
    assert all(torch.equal(found[f"{name}.weight"], weight) for name, weight in floats.items())
    assert {a.algorithm for _, a in annotated(gm) if a.lowered} == {method}
    model = Model()
    model.load_state_dict({**load_file(tmp_path / "model.safetensors"), **found}, strict=False)
    torch.testing.assert_close(gm(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_gptq_in_a_file_of_its_own_and_symmetric(tmp_path):
    foreign_folder(tmp_path, "gptq")
    (tmp_path / "config.json").unlink()
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))

    def symmetric(tensors):
        for name in ("up", "gate", "down"):
            tensors[f"{name}.qzeros"].fill_(0x77777777)

    rewrite(tmp_path, symmetric)
    gm = mq.import_compressed_tensors(tmp_path, skeleton())
    assert {str(a.scheme) for _, a in annotated(gm) if a.lowered} == {"int4 g32 sym"}


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("up.weight_scale"), "tensor 'up.weight_scale' is missing"),
        (drop("up.weight_shape"), "tensor 'up.weight_shape' is missing; int64"),
        (drop("up.bias"), r"tensor 'up.bias' is missing; float32 \[128\] is needed"),
        (drop("embed.weight"), "tensor 'embed.weight' is missing"),
        (put("norm.bias", torch.zeros(3)), r"'norm.bias' is float32 \[3\]; float32 \[64\] is needed"),
        (put("norm.bias", torch.zeros(64, dtype=torch.float16)), "build the model in float16"),
        (put("up.weight_packed", torch.zeros(128, 9, dtype=torch.int32)), "9 words a row do not hold 64 codes"),
        (put("up.weight_packed", torch.zeros(99, 8, dtype=torch.int32)), r"int32 \[99, 8\]; int32 \[128, 8\]"),
        (put("up.weight_scale", torch.zeros(128, 3)), "3 groups of 64 columns follow from no group_size"),
        (put("up.weight_shape", torch.tensor([128, 63])), r"it says \[128, 63\], and the model has \[128, 64\]"),
        (put("other.weight", torch.ones(2)), "'other.weight' has no place in the model"),
        (put("down.bias", torch.ones(64)), "'down.bias' has no place in the model"),
        (put("up.weight_g_idx", torch.arange(64, dtype=torch.int32) % 2), "desc_act=False or static_groups=True"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, message, tmp_path):
    export(tmp_path, group_size=32)
    rewrite(tmp_path, change)
    with pytest.raises(mq.CheckpointError, match=message) as error:
        mq.import_compressed_tensors(tmp_path, skeleton())
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(quant_method="bitsandbytes"), "quant_method 'bitsandbytes': one of compressed-tensors"),
        (lambda c: c.update(format="marlin-24"), "format 'marlin-24'"),
        (lambda c: c.update(transform_config={"r1": 1}), "rotated offline"),
        (lambda c: c.pop("config_groups"), "config_groups, name -> scheme, is missing"),
        (lambda c: c.update(config_groups={"W4A16": ["Linear"]}), "a preset's name is not read"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(type="float"), "float weights of 4 bits"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=24), "follow from no group_size"),
    ],
)
def test_a_config_that_cannot_be_read(change, message, tmp_path):
    export(tmp_path, group_size=32)
    reconfigure(tmp_path, change)
    with pytest.raises(mq.CheckpointError, match=message):
        mq.import_compressed_tensors(tmp_path, skeleton())


@pytest.mark.parametrize(
    ("method", "config", "change", "message"),
    [
        ("gptq", {}, put("up.g_idx", torch.arange(64, dtype=torch.int32) % 2), "desc_act=False or static_groups=True"),
        ("gptq", {"checkpoint_format": "marlin"}, None, "checkpoint_format 'marlin': 'gptq' or 'gptq_v2' can be read"),
        ("gptq", {"group_size": "32"}, None, "group_size '32' for 'up.weight'"),
        ("gptq", {"bits": 3}, None, "gptq of 3 bits"),
        ("gptq", {"bits": 8}, None, "8 words for 64 columns hold codes of 4 bits, but .* says bits 8"),
        ("gptq", {"group_size": 48}, None, "a group_size that divides the 64 columns"),
        ("gptq", {}, drop("up.qzeros"), "tensor 'up.qzeros' is missing"),
        ("awq", {"version": "gemv"}, None, "version 'gemv' of AWQ; 'gemm' can be read"),
        ("awq", {"bits": 8}, None, "awq of 8 bits"),
    ],
)
def test_gptq_and_awq_that_cannot_be_read(method, config, change, message, tmp_path):
    foreign_folder(tmp_path, method)
    reconfigure(tmp_path, lambda c: c.update(config))
    if change is not None:
        rewrite(tmp_path, change)
    with pytest.raises(mq.CheckpointError, match=message):
        mq.import_compressed_tensors(tmp_path, skeleton())


def test_buffers_without_values_are_named(tmp_path):
    export(tmp_path, group_size=32)
    model = skeleton()
    model.shift = model.shift.to("meta")
    with pytest.raises(mq.CheckpointError, match="'shift' is on the meta device, and a checkpoint does not hold it"):
        mq.import_compressed_tensors(tmp_path, model)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_weight_that_the_model_holds_transposed(method, tmp_path):
    """GPT-2's Conv1D holds [in, out]; the packed formats say nothing of that."""

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Module()
            self.up.weight = nn.Parameter(torch.empty(64, 128, device="meta"))
            self.up.bias = nn.Parameter(torch.empty(128, device="meta"))

        def forward(self, x):
            return torch.addmm(self.up.bias, x, self.up.weight)

    floats = foreign_folder(tmp_path, method)
    bias = load_file(tmp_path / "model.safetensors")["up.bias"]

    def only_up(tensors):
        for name in [n for n in tensors if not n.startswith("up.")]:
            del tensors[name]

    rewrite(tmp_path, only_up)
    gm = mq.import_compressed_tensors(tmp_path, Transposed().eval())
    x = torch.randn(3, 64)
    torch.testing.assert_close(gm(x), x @ floats["up"].t() + bias, rtol=1e-5, atol=1e-4)
    assert gm.up.weight_packed.shape == (128, 8)


def test_a_folder_of_another_model_and_a_bad_setting(tmp_path):
    export(tmp_path, group_size=32)
    with pytest.raises(mq.CheckpointError, match="it holds no quantized weight of this model"):
        mq.import_compressed_tensors(tmp_path, nn.Sequential(nn.Linear(64, 64)).eval())
    with pytest.raises(mq.ConfigError, match="compute='fast'"):
        mq.import_compressed_tensors(tmp_path, skeleton(), compute="fast")


def places(value, path=()):
    """The path of every entry of nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_a_hostile_config_is_a_clean_error_or_means_the_same(form, tmp_path):
    if form == "compressed-tensors":
        export(tmp_path, group_size=32)
    else:
        foreign_folder(tmp_path, form, version="gemm")
    text = (tmp_path / "config.json").read_text()
    want = Wanted("up.weight", 128, 64, torch.float32)
    expected = Reader.of(Checkpoint(tmp_path)).read(want).stored
    errors = 0
    for path in places(json.loads(text)):
        for value in (None, "x", -1, [["y"]]):
            config = json.loads(text)
            owner = config
            for key in path[:-1]:
                owner = owner[key]
            owner[path[-1]] = value
            (tmp_path / "config.json").write_text(json.dumps(config))
            try:
                found = Reader.of(Checkpoint(tmp_path)).read(want)
            except mq.CheckpointError:
                errors += 1
                continue
            same = (torch.equal(a, b) for a, b in zip(found.stored, expected, strict=True) if a is not None)
            assert all(same), (path, value)
    assert errors > 8
