"""A graph survives JSON to the bit, and data that are no such graph end in GraphFormatError and nothing else."""

from __future__ import annotations

import copy
import functools
import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import mono_quant_fx as mq
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.graph.tensors import get_attribute, is_persistent, module_stack, named_tensors
from mono_quant_fx.storage.graph_json.document import graph_from_json, graph_to_json
from mono_quant_fx.storage.graph_json.leaf_modules import ARGUMENTS, CLASSES, leaf_from_json, leaf_to_json
from mono_quant_fx.storage.graph_json.values import value_from_json, value_to_json
from tests import capture_models, hf_models, models
from tests.real_models import minilm


def tensors_of(gm: fx.GraphModule, data: dict[str, Any]) -> dict[str, Tensor]:
    return {name: get_attribute(gm, name) for name in data["tensors"]}


def call(gm: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return gm(**inputs)
    return gm(*inputs) if isinstance(inputs, tuple) else gm(inputs)


def round_trip(gm: fx.GraphModule, inputs: Any) -> fx.GraphModule:
    """Through text and back: the same nodes, code, annotations, tensors and outputs."""
    data = json.loads(json.dumps(graph_to_json(gm), allow_nan=False))
    state = torch.get_rng_state()
    back = graph_from_json(data, tensors_of(gm, data))
    assert torch.equal(torch.get_rng_state(), state)
    assert mq.format_graph(back) == mq.format_graph(gm)
    assert back.code == gm.code
    assert [(n.name, a) for n, a in annotated(back)] == [(n.name, a) for n, a in annotated(gm)]
    for old, new in zip(gm.graph.nodes, back.graph.nodes, strict=True):
        assert {u.name for u in old.users} == {u.name for u in new.users}
        assert module_stack(old) == module_stack(new)
        assert old.meta.get("stack_trace") == new.meta.get("stack_trace")
    for name, tensor in named_tensors(gm):
        twin = get_attribute(back, name)
        assert (twin is tensor) and is_persistent(back, name) == is_persistent(gm, name)
    assert back.state_dict().keys() == gm.state_dict().keys()
    expected, structure = torch.utils._pytree.tree_flatten(call(gm, inputs))
    got, same = torch.utils._pytree.tree_flatten(call(back, inputs))
    assert structure == same and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert not any(module.training for module in back.modules())
    return back


def x(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Any, Any]] = {
    "mlp": (models.MLP, lambda: x(3, 64)),
    "tied": (models.TiedLM, lambda: torch.arange(6).view(2, 3)),
    "conv": (models.ConvNet, lambda: x(2, 3, 8, 8)),
    "reused": (models.Reused, lambda: x(3, 64)),
}


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("name", MODELS)
def test_quantized_models_come_back_to_the_bit(name, method):
    torch.manual_seed(0)
    model, inputs = MODELS[name][0]().eval(), MODELS[name][1]()
    gm = mq.quantize(mq.capture(model, inputs, method=method), group_size=32).graph_module
    round_trip(mq.capture(model, inputs, method=method), inputs)
    round_trip(gm, inputs)


CONTAINERS = [
    (name, way)
    for name, (_, _, ways) in capture_models.CASES.items()
    for way in ways.split()
    if way != "auto" and name not in ("dataclass", "prints")
]


@pytest.mark.parametrize(("name", "way"), CONTAINERS)
def test_signatures_and_containers_come_back(name, way):
    torch.manual_seed(0)
    model, make, _ = capture_models.CASES[name]
    round_trip(mq.capture(model().eval(), make(2, 3), method=way), make(2, 3))


@pytest.mark.parametrize("settings_", [{"activations": "int8"}, {"activations": "int8_dynamic"}, {"algorithm": "gptq"}])
def test_calibrated_models_keep_what_calibration_saw(settings_):
    torch.manual_seed(0)
    data = [x(8, 64)]
    gm = mq.quantize(models.MLP().eval(), calibration_data=data, group_size=32, **settings_).graph_module
    assert any(a.observed for _, a in annotated(gm))
    round_trip(gm, data[0])


class Three(nn.Module):
    """Three linears on one input, which linear-merging puts into one."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 32) for _ in range(3))

    def forward(self, x):
        return self.q(x), {"k": self.k(x), "v": [self.v(x)]}


def test_merged_linears_keep_their_rows():
    gm = mq.quantize(Three().eval(), group_size=32, merge_linears=True).graph_module
    assert all(a.merged for _, a in annotated(gm))
    round_trip(gm, x(2, 64))


class Leaf(nn.Module):
    def __init__(self, leaf: nn.Module):
        super().__init__()
        self.fc, self.leaf = nn.Linear(32, 32), leaf

    def forward(self, x):
        y = self.leaf(self.fc(x))
        return y[0] if isinstance(self.leaf, nn.RNNBase) else y


class Attends(Leaf):
    def forward(self, x):
        y = self.fc(x)
        return self.leaf(y, y, y)[0]


LEAVES = {
    "gru": lambda: Leaf(nn.GRU(32, 16, 2, batch_first=True, bidirectional=True)),
    "lstm": lambda: Leaf(nn.LSTM(32, 16, proj_size=8)),
    "rnn": lambda: Leaf(nn.RNN(32, 16, nonlinearity="relu", bias=False)),
    "attention": lambda: Attends(nn.MultiheadAttention(32, 4, batch_first=True, add_bias_kv=True)),
    "norms": lambda: Leaf(nn.Sequential(nn.LayerNorm(32), nn.RMSNorm(32), nn.PReLU(), nn.Dropout(0.3))),
    "pool": lambda: Leaf(nn.Sequential(nn.MaxPool1d(2), nn.ZeroPad1d(1), nn.Hardtanh(-2, 3), nn.Flatten(1))),
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_modules_are_rebuilt_from_their_arguments(name):
    torch.manual_seed(0)
    gm = mq.quantize(mq.capture(LEAVES[name]().eval(), method="symbolic"), group_size=32).graph_module
    assert any(n.op == "call_module" for n in gm.graph.nodes)
    round_trip(gm, x(2, 5, 32))


def encoder(layers: int = 0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else layer


@pytest.mark.parametrize("leaf", [encoder(), encoder(2), nn.EmbeddingBag(5, 3)], ids=lambda m: type(m).__name__)
def test_modules_whose_kernels_take_offsets_and_masks_on_trust_are_not_written_down(leaf):
    """A graph from a stranger that called one with arguments of its choice ended the process."""
    with pytest.raises(
        mq.NotSelfContainedError, match=f"{type(leaf).__name__} cannot be rebuilt without code; capture"
    ):
        leaf_to_json(leaf)


SIMPLE = {
    "SELU": {}, "GELU": {"approximate": "tanh"}, "Softplus": {"beta": 2.0}, "Softmax": {"dim": -1},
    "BatchNorm2d": {"num_features": 4, "affine": False}, "GroupNorm": {"num_groups": 2, "num_channels": 4},
    "InstanceNorm1d": {"num_features": 4, "affine": True}, "AdaptiveAvgPool2d": {"output_size": (None, 3)},
    "AvgPool2d": {"kernel_size": 2, "divisor_override": 3}, "Unflatten": {"dim": 1, "unflattened_size": (2, -1)},
    "Upsample": {"scale_factor": 2.0, "mode": "bilinear", "align_corners": True}, "Fold": {"output_size": 4, "kernel_size": 2},  # noqa: E501
    "Embedding": {"num_embeddings": 5, "embedding_dim": 3, "padding_idx": 1}, "LSTMCell": {"input_size": 3, "hidden_size": 4},  # noqa: E501
    "ConvTranspose2d": {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "groups": 2, "bias": False},
    "Conv2d": {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    "Bilinear": {"in1_features": 2, "in2_features": 3, "out_features": 4}, "PixelShuffle": {"upscale_factor": 2},
    "TransformerDecoderLayer": {"d_model": 8, "nhead": 2, "bias": False}, "LocalResponseNorm": {"size": 2},
    "ConstantPad2d": {"padding": (1, 2, 3, 4), "value": 0.5}, "ReLU6": {"inplace": True}, "RReLU": {"lower": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", SIMPLE)
def test_a_module_is_its_class_and_arguments(name):
    module = CLASSES[name](**SIMPLE[name]).eval()
    record = json.loads(json.dumps(leaf_to_json(module)))
    assert set(record["args"]) == set(ARGUMENTS[name])
    back = leaf_from_json(record, 100)
    assert repr(back) == repr(module) and all(t.is_meta for t in back.state_dict().values())
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}


def test_the_blocks_of_an_export_come_back_as_graphs_and_guards():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.fc(x)
            with torch.no_grad():
                z = x.cos() + torch.arange(32, device=x.device, dtype=torch.float32)
            return y.float() * z

    gm = mq.capture(Autocast().eval(), x(2, 32), method="export")
    assert any(isinstance(m, fx.GraphModule) for n, m in gm.named_modules() if n)
    back = round_trip(gm, x(5, 32))
    with pytest.raises(AssertionError, match="Guard failed"):
        back(x(5, 31))
    round_trip(back, x(3, 32))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | st.text() | st.just(...)
    | st.sampled_from([torch.float16, torch.strided, torch.channels_last, torch.device("cuda:1"), torch.Size([2, 3]), 1 + 2j])  # noqa: E501
    | st.builds(slice, st.integers(0, 9), st.none()) | st.builds(range, st.integers(0, 9)),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
@settings(derandomize=True, deadline=None)
def test_arguments_come_back_with_their_types(value):
    assert repr(value_from_json(json.loads(json.dumps(value_to_json(value), allow_nan=False)))) == repr(value)


class Plain(nn.Module):
    """Gives a Hugging Face model's output as a dict."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return {k: v for k, v in self.model(**inputs).items() if isinstance(v, Tensor)}


FAST = ("bert", "llama")
#: Two models' checks of their sizes branch, which no graph can hold; mixtral calls a function of its own.
REFUSED = {
    "mixtral": "transformers.grouped_mm_fallback",
    "convnext": "'_guards_fn': a check of its inputs cannot be written as a graph",
    "wav2vec2": "'_guards_fn': a check of its inputs cannot be written as a graph",
}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in hf_models.NAMES])
def test_hugging_face_models_that_return_a_dict_are_self_contained(name):
    inputs = hf_models.inputs(name, 2, 6)
    gm = mq.quantize(Plain(hf_models.build(name)).eval(), inputs, group_size=16).graph_module
    if name in REFUSED:
        with pytest.raises(mq.NotSelfContainedError, match=REFUSED[name]):
            graph_to_json(gm)
    else:
        round_trip(gm, inputs)


def test_a_container_class_of_its_own_is_named_with_the_way_out():
    gm = mq.capture(hf_models.build("bert"), hf_models.inputs("bert", 2, 6))
    with pytest.raises(mq.NotSelfContainedError, match=r"container .*BaseModelOutput.*wrap the model in a Module"):
        graph_to_json(gm)


@pytest.mark.slow
def test_minilm_comes_back_to_the_bit():
    inputs = minilm.calibration()[0]
    round_trip(mq.quantize(minilm.load(), inputs).graph_module, inputs)


class Odd(nn.Module):
    def forward(self, x):
        return x + 1


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda *_: None)
    return module


def overridden(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module


def traced(model: nn.Module, leaf: type[nn.Module]) -> fx.GraphModule:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, leaf) or super().is_leaf_module(m, name)

    return fx.GraphModule(model, Tracer().trace(model)).eval()


def of_calls(*calls: Any) -> fx.GraphModule:
    new = fx.Graph()
    value = new.placeholder("x")
    for target in calls:
        value = new.call_method(target, (value,)) if isinstance(target, str) else new.call_function(target, (value,))
    new.output(value)
    return fx.GraphModule(nn.Module(), new).eval()


REFUSALS: dict[str, tuple[Any, str]] = {
    "a module class": (lambda: traced(nn.Sequential(Odd()), Odd), r"node '_0': the module class .*Odd"),
    "a hook": (lambda: traced(nn.Sequential(hooked(nn.GELU())), Odd), r"a hook hangs on the graph\.0"),
    "a forward": (lambda: traced(nn.Sequential(overridden(nn.GELU())), Odd), r"node '_0'.*forward is overridden"),
    "a parametrization": (
        lambda: traced(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), Odd),
        r"node '_0': the module class .*ParametrizedLinear",
    ),
    "a function": (lambda: of_calls(torch.save), r"node 'save': it calls torch\.serialization\.save"),
    "an overload": (lambda: of_calls(torch.ops.aten.from_file.default), r"it calls aten\.from_file\.default"),
    "a method": (lambda: of_calls("share_memory_"), r"it calls the tensor method \.share_memory_"),
    "training": (lambda: of_calls(torch.relu).train(), r"training mode; call \.eval\(\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_stored_is_named(name):
    make, message = REFUSALS[name]
    with pytest.raises(mq.NotSelfContainedError, match=message):
        graph_to_json(make())


# ------------------------------------------------------------------ data that are no graph


@functools.cache
def real(name: str) -> tuple[str, dict[str, Tensor]]:
    """A real graph as text, with its tensors."""
    torch.manual_seed(0)
    if name == "export":
        gm = mq.capture(capture_models.Nested().eval(), capture_models.CASES["nested"][1](2, 3), method="export")
    elif name == "leaf":
        gm = mq.quantize(mq.capture(LEAVES["gru"]().eval(), method="symbolic"), group_size=32).graph_module
    else:
        gm = mq.quantize(models.TiedLM().eval(), group_size=32).graph_module
    data = graph_to_json(gm)
    return json.dumps(data), tensors_of(gm, data)


def node(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for n in data["graph"]["nodes"] if n["op"] == op)


def put(kind: str, /, **changes: Any) -> Any:
    return lambda data: node(data, kind).update(changes)


RUN = "print(__import__('pathlib').Path('/tmp/never').touch())"
HOSTILE: dict[str, tuple[str, Any, str]] = {
    "function": ("tied", put("call_function", target="os.system"), r"node '\w+': it calls 'os\.system', which is not"),
    "import": ("tied", put("call_function", target="builtins.__import__"), "which is not among"),
    "load": ("tied", put("call_function", target="torch.load"), "which is not among"),
    "file op": ("tied", put("call_function", target="aten.from_file.default"), "which is not among"),
    "script op": ("tied", put("call_function", target="aten.save.default"), "which is not among"),
    "namespace": ("tied", put("call_function", target="aten.__class__.default"), "which is not among"),
    "reduce": ("tied", put("call_function", op="call_method", target="__reduce__"), "the method '__reduce__'"),
    "method": ("tied", put("call_function", op="call_method", target=f"t(); {RUN}"), "the method"),
    "text": ("tied", put("call_function", op="call_method", target="t", args=["a", "b"]), "a method needs a node"),
    "newline": ("tied", put("placeholder", name=f"x\n    {RUN}"), "its name is"),
    "keyword": ("tied", put("placeholder", name="class"), "its name is 'class'"),
    "builtin": ("tied", put("placeholder", name="print"), "torch.fx keeps the name"),
    "parameter": ("tied", put("placeholder", target=f"x={RUN}"), "no name of a parameter"),
    "self": ("tied", put("placeholder", target="self"), "for something else"),
    "path": ("tied", put("get_attr", target=f'a"), {RUN}, ("'), "dotted path"),
    "class path": ("tied", put("get_attr", target="__class__.__init__"), "dotted path"),
    "taken path": ("tied", put("get_attr", target="forward"), "every module has"),
    "container": ("tied", put("get_attr", target="emb"), "there is no record of it"),
    "kwarg": ("tied", put("call_function", kwargs={f"x={RUN}, y": 1}), "keys are Python names"),
    "reference": ("tied", put("call_function", args=[{"node": "later"}]), "no node before this one"),
    "attribute": (
        "tied",
        put("call_function", target="builtins.getattr", args=[{"node": "ids"}, "__class__"]),
        "getattr reads '__class__'",
    ),
    "operator": ("tied", put("call_function", target="operator.add", args=[]), "takes 2 arguments"),
    "in place": ("tied", put("call_function", target="operator.iadd", args=[1, 2], kwargs={}), "which is no node"),
    "int": ("tied", put("call_function", args=[10**5000]), "a very large int"),
    "depth": ("tied", put("call_function", args=[functools.reduce(lambda a, _: [a], range(900), 1)]), "32 deep"),
    "module": (
        "leaf",
        lambda d: d["graph"]["modules"]["leaf"].update({"class": "Module"}),
        "a module's class is 'Module'",
    ),
    "eval": ("leaf", lambda d: d["graph"]["modules"]["leaf"].update({"class": "builtins.eval"}), "'builtins.eval'"),
    "layers": (
        "leaf",
        lambda d: d["graph"]["modules"]["leaf"]["args"].update(num_layers=10**9),
        "num_layers is 1000000000",
    ),
    "sizes": (
        "leaf",
        lambda d: d["graph"]["modules"]["leaf"]["args"].update(hidden_size=17),
        "'s shape is|its tensors",
    ),
    "colon": ("export", put("placeholder", args=[f"#:{RUN}"]), "without either"),
    "keywords": ("export", lambda d: d["graph"]["codegen"]["arguments"].append(f"a={RUN}"), "different Python names"),
    "inputs": (
        "export",
        lambda d: d["graph"]["codegen"].update(
            inputs={"tuple": [{"tuple": []}, {"dict": [[f"':{RUN}, '{i}", "*"] for i in range(4)]}]}
        ),
        "codegen's keywords",
    ),
    "missing": ("tied", lambda d: d["tensors"].pop("fc.bias"), "is given, and the graph has no record"),
    "dtype": ("tied", lambda d: d["tensors"]["fc.bias"].update(dtype="float16"), r"tensor 'fc.bias': its dtype"),
    "shape": ("tied", lambda d: d["tensors"]["fc.bias"].update(shape=[7]), r"tensor 'fc.bias': its shape"),
    "version": ("tied", lambda d: d.update(version=2), "version 1 is read here"),
    "extra": ("tied", lambda d: d.update(code="x"), "unknown key 'code'"),
    "spare": (
        "tied",
        lambda d: d["graph"]["modules"].update(m={"class": "GELU", "args": {"approximate": "none"}}),
        "no node reads it",
    ),
    "doubled": ("tied", lambda d: d["graph"]["nodes"].insert(0, d["graph"]["nodes"][0]), "another node has it"),
    "no output": ("tied", lambda d: d["graph"]["nodes"].pop(), "the one output"),
    "scheme": (
        "tied",
        lambda d: next(n for n in d["graph"]["nodes"] if "annotation" in n)["annotation"].update(shape="x"),
        "an annotation.shape",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_data_end_in_the_typed_error(name, capsys):
    base, change, message = HOSTILE[name]
    text, tensors = real(base)
    data = json.loads(text)
    change(data)
    with pytest.raises(mq.GraphFormatError, match=message):
        graph_from_json(data, tensors)
    assert capsys.readouterr().out == ""


def test_a_string_with_quotes_is_a_string(capsys):
    text, tensors = real("tied")
    data = json.loads(text)
    evil = f"'\"); {RUN} #\n"
    node(data, "placeholder")["args"] = [evil]
    gm = graph_from_json(data, tensors)
    assert next(iter(gm.graph.nodes)).args == (evil,) and gm.forward.__func__.__defaults__ == (evil,)
    assert capsys.readouterr().out == ""


def test_tensors_are_checked_against_their_records():
    text, tensors = real("tied")
    for change, message in (
        ({"spare": x(2)}, "no record"),
        ({"fc.bias": x(3)}, "shape"),
        ({"fc.bias": None}, "torch.Tensor"),
    ):
        with pytest.raises(mq.GraphFormatError, match=message):
            graph_from_json(json.loads(text), {**tensors, **change})
    with pytest.raises(mq.GraphFormatError, match="not among the tensors given"):
        graph_from_json(json.loads(text), {k: v for k, v in tensors.items() if k != "fc.bias"})


def spot(data: Any, chance: random.Random) -> tuple[Any, Any]:
    """A container somewhere in the data and one of its keys."""
    while True:
        key = chance.choice(list(data) if isinstance(data, dict) else range(len(data)))
        inner = data[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.2:
            return data, key
        data = inner


JUNK: list[Any] = [
    None, True, -1, 2**70, 1e300, "", "x", "os.system", "a.b", "__class__", "torch", [], [[]], {}, {"node": "x"}, {"tuple": 3},  # noqa: E501
    {"dict": [[1]]}, {"slice": []}, {"device": "x:y"}, {"graph": {}}, [None], "é", "\n", "self", "output", 10**400,
]  # fmt: skip


@pytest.mark.parametrize("base", ["tied", "leaf", "export"])
@pytest.mark.parametrize("block", range(5))
def test_mutated_graphs_are_refused_or_still_graphs(base, block):
    text, tensors = real(base)
    refused = 0
    for seed in range(block * 30, block * 30 + 30):
        chance, data = random.Random(seed), json.loads(text)
        for _ in range(chance.randint(1, 3)):
            owner, key = spot(data, chance)
            action = chance.choice(["junk", "drop", "copy"])
            if action == "drop" and len(owner) > 1:
                del owner[key]
            elif action == "junk":
                owner[key] = copy.deepcopy(chance.choice(JUNK))
            else:
                other, name = spot(json.loads(text), chance)
                owner[key] = copy.deepcopy(other[name])
        try:
            graph_from_json(data, tensors).graph.lint()
        except mq.GraphFormatError:
            refused += 1
    assert refused > 10


@given(st.recursive(st.sampled_from(JUNK), lambda i: st.lists(i) | st.dictionaries(st.text(), i), max_leaves=10))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_anything_else_is_refused(data):
    with pytest.raises(mq.GraphFormatError):
        graph_from_json(data, {})
