"""save and load: bitwise the same model, from a skeleton without values or from the file alone."""

import copy
import dataclasses
import functools
import json
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mono_quant_fx as mq
from mono_quant_fx.files.reader import TensorFile, TensorWriter
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.graph.tensors import module_path, named_tensors
from mono_quant_fx.storage import saving


class Attention(nn.Module):
    """Projections of one input (they merge), one with zero points of its own, and a buffer outside the state_dict."""

    def __init__(self, width=64):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, n) for n in (width, 32, 32))
        self.out = nn.Linear(width, width, bias=False)
        self.register_buffer("shift", torch.arange(float(width)), persistent=False)

    def forward(self, x, scale: float = 1.0):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(torch.cat([k * v, v], -1) * q * scale + self.shift)


class Tied(nn.Module):
    """A head tied to the embedding, a recurrent leaf, and a decision that only torch.export sees."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.cell = nn.GRU(64, 64, batch_first=True)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids, wide=True):
        y = self.norm(self.cell(self.table(ids))[0])
        return {"logits": self.head(y), "last": (y[:, -1],)} if wide else y


class Branching(nn.Module):
    """Symbolic tracing cannot see which way it goes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 16)

    def forward(self, x, flag: bool = True):
        if x.shape[-1] == 64 and flag:
            x = self.a(x).relu()
        return self.b(x if x.dim() > 1 else x[None])


def stack():
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 32), nn.Tanh(), nn.Linear(32, 5))


IDS = torch.arange(14).view(2, 7)
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
#: model, example, settings
CASES = {
    "plain": (stack, torch.randn(2, 4, 8, 8), {}),
    "int8": (stack, torch.randn(2, 4, 8, 8), {"bits": 8}),
    "merged": (Attention, X, {"group_size": 16}),
    "asymmetric": (Attention, X, {"group_size": 16, "symmetric": False, "skip_layer_names": ["v"]}),
    "apart": (Attention, X, {"group_size": 32, "merge_linears": False, "overrides": {"k": "int8"}}),
    "keywords": (Attention, {"x": X, "scale": 0.5}, {"group_size": 16}),
    "gptq": (Attention, X, {"group_size": 16, "calibration_data": [torch.randn(64, 64)], "bias_correction": True}),
    "activations": (
        Attention, X,
        {"group_size": 16, "calibration_data": [torch.randn(64, 64)], "activations": "int8", "bias_correction": True},
    ),
    "tied": (Tied, IDS, {"default_skips": False}),
    "branching": (Branching, {"x": X, "flag": True}, {"group_size": 32}),
}  # fmt: skip


def quantized(name: str, dtype=torch.float32) -> tuple[mq.QuantizationResult, "nn.Module", object]:
    make, example, settings = CASES[name]
    torch.manual_seed(0)
    model = make().eval().to(dtype)
    example, settings = pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (example, settings)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mq.quantize(model, example, accuracy_warning="ignore", **settings), model, example


def run(gm, example) -> list[Tensor]:
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(gm(*args, **kwargs)) if isinstance(t, Tensor)]


def assert_same(actual: mq.QuantizationResult, expected: mq.QuantizationResult, example) -> None:
    for a, b in zip(run(actual.graph_module, example), run(expected.graph_module, example), strict=True):
        assert torch.equal(a, b)
    assert actual.graph_module.code == expected.graph_module.code
    assert str(actual) == str(expected)
    assert (actual.info, actual.config, actual.accuracy) == (expected.info, expected.config, expected.accuracy)
    found, wanted = (dict(named_tensors(r.graph_module)) for r in (actual, expected))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
        assert isinstance(found[name], nn.Parameter) == isinstance(tensor, nn.Parameter)
    pairs = zip(annotated(actual.graph_module), annotated(expected.graph_module), strict=True)
    assert all(a == b and n.name == m.name for (n, a), (m, b) in pairs)
    assert set(actual.graph_module.state_dict()) == set(expected.graph_module.state_dict())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_meta", [True, False])
def test_a_skeleton_gets_everything_back(name, is_meta, tmp_path):
    result, model, example = quantized(name)
    result.save(tmp_path / "m.safetensors")
    skeleton = copy.deepcopy(model)
    if is_meta:
        skeleton = skeleton.to("meta")
    else:
        for _, tensor in named_tensors(skeleton):
            tensor.data.fill_(float("nan"))  # values are not read
    before = {n: id(t) for n, t in named_tensors(skeleton)}
    again = mq.load(tmp_path / "m.safetensors", skeleton)
    assert_same(again, result, example)
    assert {n: id(t) for n, t in named_tensors(skeleton)} == before
    assert not any(t.is_meta for _, t in named_tensors(again.graph_module))
    again.save(tmp_path / "n.safetensors")
    assert (tmp_path / "n.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_a_file_with_its_graph_needs_no_model(name, tmp_path):
    result, model, example = quantized(name)
    result.save(tmp_path / "m.safetensors", graph=True)
    again = mq.load(tmp_path / "m.safetensors")
    assert_same(again, result, example)
    pairs = zip(again.graph_module.graph.nodes, result.graph_module.graph.nodes, strict=True)
    assert all(mq.history(a) == mq.history(b) and module_path(a) == module_path(b) for a, b in pairs)
    assert_same(mq.load(tmp_path / "m.safetensors", model), result, example)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    result, model, example = quantized("merged", dtype)
    mq.save(result, tmp_path / "m.safetensors")
    assert_same(mq.load(tmp_path / "m.safetensors", copy.deepcopy(model).to("meta")), result, example)


def test_names_in_the_file_are_the_models_and_merged_rows_are_one_view(tmp_path):
    result, model, _ = quantized("merged")
    result.save(tmp_path / "m.safetensors")
    file = TensorFile(tmp_path / "m.safetensors")
    stored = {"weight_packed", "weight_scale", "bias"}
    names = {f"{module}.{part}" for module in "qkv" for part in stored} | {"out.weight_packed", "out.weight_scale"}
    assert set(file.entries) == names | {"shift", saving.DIGESTS}
    assert all(file.span([f"{m}.{part}" for m in "qkv"]) is not None for part in stored)
    assert all(e.start % e.dtype.itemsize == 0 for e in file.entries.values())
    for name in names:
        assert torch.equal(saving.digest(file.tensor(name)), digests(file)[name])
    gm = mq.load(tmp_path / "m.safetensors", model).graph_module
    before = (tmp_path / "m.safetensors").read_bytes()
    gm.state_dict()["q_k_v.weight_packed"].zero_()  # a memory map, and a private one
    assert (tmp_path / "m.safetensors").read_bytes() == before


def digests(file):
    names = [name for name in file.entries if name != saving.DIGESTS]
    return dict(zip(names, file.tensor(saving.DIGESTS), strict=True))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    result, model, _ = quantized("tied")
    result.save(tmp_path / "m.safetensors")
    assert not any("head" in name for name in TensorFile(tmp_path / "m.safetensors").entries)
    skeleton = copy.deepcopy(model).to("meta")  # which unties
    assert skeleton.head.weight is not skeleton.table.weight
    state = mq.load(tmp_path / "m.safetensors", skeleton).graph_module.state_dict()
    assert state.keys() == result.graph_module.state_dict().keys()


def test_a_fresh_process_without_the_float_weights(tmp_path):
    result, _, example = quantized("merged")
    result.save(tmp_path / "m.safetensors", graph=True)
    torch.save(run(result.graph_module, example), tmp_path / "y.pt")
    torch.save(example, tmp_path / "x.pt")
    code = f"""
import torch, mono_quant_fx as mq
from tests.test_storage import Attention
x = torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)
with torch.device("meta"):
    skeleton = Attention().eval()
for model in (skeleton, None):
    y = mq.load({str(tmp_path / "m.safetensors")!r}, model).graph_module(x)
    assert torch.equal(y, torch.load({str(tmp_path / "y.pt")!r}, weights_only=True)[0])
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stderr


def test_a_state_dict_goes_through_torch_save(tmp_path):
    result, _, example = quantized("merged")
    expected = run(result.graph_module, example)[0]
    torch.save(result.graph_module.state_dict(), tmp_path / "m.pt")
    other = mq.quantize(Attention().eval(), example, accuracy_warning="ignore", group_size=16).graph_module
    assert not torch.equal(run(other, example)[0], expected)
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(run(other, example)[0], expected)


class Wider(Attention):
    def __init__(self):
        super().__init__()
        self.v = nn.Linear(64, 48)


class Longer(Attention):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(64, 64)

    def forward(self, x, scale: float = 1.0):
        return self.more(super().forward(x, scale))


class Shorter(Attention):
    def forward(self, x, scale: float = 1.0):
        return self.q(x) * scale + self.shift


class Unbiased(Attention):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(64, 64, bias=False)


@pytest.mark.parametrize(
    ("skeleton", "said"),
    [
        (Wider, r"weight 'v.weight' is float32\[48, 64\] in the model and was float32\[32, 64\]"),
        (Longer, "the model has a weight 'more.weight' that the plan does not know"),
        (Shorter, "the plan has a weight 'k.weight' that the model does not have"),
        (stack, "cannot be captured as the saved model was"),
        (Unbiased, r"q.bias is in the file and not in the model"),
        (lambda: Attention().bfloat16(), r"weight 'q.weight' is bfloat16\[64, 64\] in the model and was float32"),
        (dict, "torch.nn.Module is needed, not dict"),
    ],
)
def test_a_model_that_does_not_fit_is_told_how(skeleton, said, tmp_path):
    result, _, _ = quantized("merged")
    result.save(tmp_path / "m.safetensors")
    model = skeleton()
    if isinstance(model, nn.Module):
        model.eval()
    with pytest.raises(mq.MonoQuantError, match=said) as e:
        mq.load(tmp_path / "m.safetensors", model)
    assert isinstance(e.value, mq.PlanError | mq.CaptureError)


def test_a_file_without_a_graph_asks_for_the_model(tmp_path):
    result, _, _ = quantized("plain")
    result.save(tmp_path / "m.safetensors")
    with pytest.raises(mq.PlanError, match=r"m.safetensors holds no graph: pass the float model.*graph=True"):
        mq.load(tmp_path / "m.safetensors")


def test_a_model_in_training_mode_is_refused(tmp_path):
    result, model, _ = quantized("plain")
    result.save(tmp_path / "m.safetensors")
    with pytest.raises(mq.CaptureError, match=r"call model.eval\(\) first"):
        mq.load(tmp_path / "m.safetensors", copy.deepcopy(model).train())


def test_a_graph_of_the_users_own_is_loaded_into_such_a_graph(tmp_path):
    gm = torch.fx.symbolic_trace(stack().eval())
    example = CASES["plain"][1]
    result = mq.quantize(gm, example, accuracy_warning="ignore")
    result.save(tmp_path / "m.safetensors")
    again = mq.load(tmp_path / "m.safetensors", torch.fx.symbolic_trace(stack().eval()))
    assert_same(again, result, example)
    with pytest.raises(mq.CaptureError, match=r"captured by other means than mq.capture; capture the model yourself"):
        mq.load(tmp_path / "m.safetensors", stack().eval())


def test_sizes_of_its_own_ask_for_the_graph(tmp_path):
    shapes = {"x": {0: torch.export.Dim("rows", min=2)}, "flag": None}
    captured = mq.capture(Branching().eval(), {"x": X, "flag": True}, method="export", dynamic_shapes=shapes)
    result = mq.quantize(captured, {"x": X, "flag": True}, group_size=32, accuracy_warning="ignore")
    result.save(tmp_path / "m.safetensors")
    with pytest.raises(mq.CaptureError, match="captured with dynamic_shapes of its own; capture the model yourself"):
        mq.load(tmp_path / "m.safetensors", Branching().eval())
    fresh = mq.capture(Branching().eval(), {"x": X, "flag": True}, method="export", dynamic_shapes=shapes)
    assert_same(mq.load(tmp_path / "m.safetensors", fresh), result, {"x": X, "flag": True})


def rewritten(path, change) -> None:
    """The same tensors with another header entry."""
    file = TensorFile(path)
    about = json.loads(file.metadata[saving.KEY])
    about = change(about) or about
    tensors = {name: file.tensor(name).clone() for name in file.entries}
    metadata = {saving.KEY: about if isinstance(about, str) else json.dumps(about)}
    with TensorWriter(path, [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def put(path, value):
    """Sets what lies at a dotted path of the header entry."""

    def change(about):
        *way, last = path.split(".")
        for step in way:
            about = about[int(step) if step.isdigit() else step]
        about[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: "{", "its 'mono_quant_fx' entry is no JSON"),
        (lambda about: "[" * 100_000, "no JSON|nested too deep"),
        (lambda about: [1], "format_version None"),
        (put("format_version", 2), "format_version 2; this release reads 1"),
        (put("plan", 3), "plan: a list needed, not 3"),
        (put("plan.0.weight", None), r"plan\[0\].weight: str needed, not None"),
        (put("plan.0.surprise", 1), r"plan\[0\]: no field 'surprise' needed"),
        (put("plan.0.scheme.bits", 3), r"plan\[0\].scheme: bits=3: bits is 4 or 8"),
        (put("plan.0.scheme.bits", True), r"plan\[0\].scheme.bits: int needed, not True"),
        (put("config.compute", "exec"), "config: compute='exec'"),
        (put("table.rows", {}), "table.rows: a list needed"),
        (put("tied", {"a": 1}), "tied.a: str needed, not 1"),
        (put("capture.method", "given"), "by other means"),
        (put("capture.inputs", {"args": [{"tensor": ["Tensor", [1]]}], "kwargs": {}}), "recorded example inputs"),
        (put("capture.inputs", {"args": [{"tensor": ["float32", [-1]]}], "kwargs": {}}), "recorded example inputs"),
        (put("capture.inputs", {"args": [{"eval": "1"}], "kwargs": {}}), "recorded example inputs"),
    ],
)
def test_a_header_that_is_not_ours_is_a_clean_error(change, said, tmp_path):
    result, model, _ = quantized("branching")
    result.save(tmp_path / "m.safetensors")
    rewritten(tmp_path / "m.safetensors", change)
    with pytest.raises((mq.FileFormatError, mq.CaptureError), match=said):
        mq.load(tmp_path / "m.safetensors", model)


def test_a_tensor_that_is_missing_or_too_many(tmp_path):
    result, model, _ = quantized("merged")
    result.save(tmp_path / "m.safetensors")
    tensors = {n: TensorFile(tmp_path / "m.safetensors").tensor(n).clone() for n in ("q.bias", "k.bias", "shift")}
    metadata = TensorFile(tmp_path / "m.safetensors").metadata
    with TensorWriter(
        tmp_path / "n.safetensors", [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], metadata
    ) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with pytest.raises(mq.PlanError, match=r"weight 'q.weight' has a scheme, but there is no tensor 'q.weight_packed'"):
        mq.load(tmp_path / "n.safetensors", model)


def test_another_file_is_no_model(tmp_path):
    with TensorWriter(tmp_path / "n.safetensors", [], {}) as _:
        pass
    with pytest.raises(mq.FileFormatError, match="no 'mono_quant_fx' entry in its header"):
        mq.load(tmp_path / "n.safetensors", Attention().eval())


def test_the_record_round_trips():
    result, _, _ = quantized("activations")
    for _, annotation in annotated(result.graph_module):
        for field in dataclasses.fields(annotation):
            assert field.name == "stored" or field.repr  # what repr shows is what is stored


def places(data, here=()):
    """Every place in JSON data."""
    yield here
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*here, key))


VALUES = st.sampled_from(
    [None, True, -1, 0, 3, 1e300, "", "x", "a.b", "re:(", "float32", "int8 asym", [], [0], [[]], {}, {"a": 1}, 2**70]
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(["merged", "activations"]))
def test_a_header_with_anything_anywhere_loads_or_says_why(data, name, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"{name}.safetensors"
    result, model, example = cached(name)
    result.save(path)
    about = json.loads(TensorFile(path).metadata[saving.KEY])
    way = data.draw(st.sampled_from([p for p in places(about) if p]))
    value = data.draw(VALUES)

    def change(about):
        for step in way[:-1]:
            about = about[step]
        about[way[-1]] = value

    rewritten(path, change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            again = mq.load(path, model)
        except mq.MonoQuantError:
            return
        run(again.graph_module, example)  # what is loaded runs


cached = functools.cache(quantized)
