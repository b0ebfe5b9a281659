"""What we attach never takes the place of what the model has, and what a pass did is never overlooked.

Each section is a kind of fault; its docstrings tell what went wrong.
"""

import itertools
import sys
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import fx, nn

import mono_quant_fx as mq
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import pending, set_annotation
from mono_quant_fx.graph.codes import codes_of
from mono_quant_fx.graph.fingerprint import fingerprint
from mono_quant_fx.graph.free_names import LONGEST, free_name, free_names

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
ALL = {"group_size": 16, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
#: dB that 8 bits reach on random weights, and one's own tensor in another's place leaves far behind.
LEAST_INT8_DB = 30.0
OURS = [
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_bias", "bias", "bias_1",
    "input_scale", "input_zero_point", "weight_input_scale", "weight_scale_1",
]  # fmt: skip


class Own(nn.Module):
    """A linear with parameters or buffers of its own under the names that we would take."""

    def __init__(self, names, buffers=False):
        super().__init__()
        self.weight, self.names = nn.Parameter(torch.randn(32, 32) / 6), names
        for i, name in enumerate(names):
            value = torch.full((32,), 1.5 + i / 8)
            if buffers:
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        y = F.linear(x, self.weight)
        for name in self.names:
            y = y * getattr(self, name)
        return y


def own(model, x, **fields):
    return mq.quantize(mq.capture(model.eval(), x), calibration_data=[x], evaluation_data=[x], **{**ALL, **fields})


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    st.lists(st.sampled_from(OURS), min_size=1, max_size=5, unique=True),
    st.booleans(),
    st.sampled_from([{}, {"symmetric": False}, {"activations": "int8"}, {"bias_correction": True}]),
    st.booleans(),
)
def test_tensors_of_the_model_keep_their_names_and_values(names, buffers, fields, is_root):
    """A parameter called weight_scale was overwritten by ours: 0.008 dB, or a shape error at run time."""
    layer, x = Own(names, buffers), torch.randn(8, 32)
    model = layer if is_root else nn.Sequential(layer)
    result = own(model, x, bits=8, algorithm="rtn", **fields)
    assert mq.sqnr_db(model(x), result.graph_module(x)) > LEAST_INT8_DB
    state = result.graph_module.state_dict()
    for name, value in model.state_dict().items():
        assert name.endswith(".weight") or name == "weight" or torch.equal(state[name], value)


@pytest.mark.parametrize("fields", [{}, {"activations": "int8"}, {"bias_correction": True}, {"symmetric": False}])
def test_a_file_gives_the_same_names_back(tmp_path, fields):
    """The names are chosen once: the plan carries them, and loading finds the tensors under them."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Own(OURS[:7]), Own(["weight_scale"], buffers=True)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model, x = Two().eval(), torch.randn(8, 32)
    result = mq.quantize(model, x, calibration_data=[x], **ALL, **fields)
    for graph_too in (False, True):
        path = tmp_path / f"{graph_too}.safetensors"
        mq.save(result, path, graph=graph_too)
        again = mq.load(path, None if graph_too else Two().eval())
        assert torch.equal(again.graph_module(x), result.graph_module(x))
        assert set(again.graph_module.state_dict()) == set(result.graph_module.state_dict())
    back = mq.dequantize_model(result.graph_module)
    assert torch.allclose(back(x), result.graph_module(x), atol=1e-5) or fields


def test_a_submodule_or_a_plain_name_in_the_way_is_left_alone():
    """A module called gate_up, a parameter on the way to a name, a module called like an observer."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
            self.gate_up = nn.Parameter(torch.full((32,), 2.0))
            self.observer_of_x = nn.Tanh()

        def forward(self, x):
            return self.gate(x) * self.up(self.observer_of_x(x) * 0 + x) + self.up(x) * self.gate_up

    class Simple(Gated):
        def forward(self, x):
            return self.observer_of_x(self.gate(x)) * self.up(x) * self.gate_up

    for kind in (Gated, Simple):
        model, x = kind().eval(), torch.randn(8, 32)
        result = own(model, x, bits=8, activations="int8", algorithm="rtn")
        assert mq.sqnr_db(model(x), result.graph_module(x)) > LEAST_INT8_DB
        assert torch.equal(result.graph_module.gate_up, model.gate_up)


def test_exporting_refuses_a_name_that_the_format_wants_for_itself(tmp_path):
    """compressed-tensors stores weight_scale under that very name: the model's own tensor was replaced in silence."""

    class Linear(nn.Linear):
        def __init__(self):
            super().__init__(32, 32)
            self.weight_shape = nn.Parameter(torch.ones(32))

        def forward(self, x):
            return F.linear(x, self.weight, self.bias) * self.weight_shape

    result = own(nn.Sequential(Linear()), torch.randn(4, 32), algorithm="rtn")
    with pytest.raises(mq.CheckpointError, match=r"0\.weight_shape"):
        mq.export_compressed_tensors(result, tmp_path / "out")


def test_free_names_carry_one_number_and_never_run_the_models_code():
    class Owner(nn.Module):
        scale = property(lambda self: pytest.fail("ran the model's code"))

    gm = nn.Module()
    gm.a, gm.t = Owner(), nn.Parameter(torch.ones(1))
    assert free_names(gm, ["a.packed", "a.scale"]) == ("a.packed_1", "a.scale_1")
    assert free_name(gm, "t.x") == "t_x", "a tensor is no module to put it into"
    assert free_name(gm, "b.c.x", {"b.c.x"}) == "b.c.x_1"
    with pytest.raises(mq.PassError, match="'t' is no module"):
        tensors.attach(gm, "t.x", torch.ones(1))
    assert isinstance(gm.t, nn.Parameter)


# --- the name of many merged linears ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "expert_with_a_long_name_" * 8])
def test_a_wide_merge_has_a_short_name_that_a_file_holds(tmp_path, prefix):
    """2,000 linears of one input made a name of 8,905 characters, which save(graph=True) could not read back."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleDict({f"{prefix}{i}": nn.Linear(16, 8) for i in range(40)})

        def forward(self, x):
            return sum(expert(x) for expert in self.experts.values())

    model, x = Wide().eval(), torch.randn(2, 16)
    result = mq.quantize(mq.capture(model, x, method="symbolic"), **ALL)
    names = set(result.graph_module.state_dict())
    assert len(names) == 3 and all(len(name) < LONGEST + 32 for name in names), names
    again = mq.quantize(mq.capture(model, x, method="symbolic"), **ALL)
    assert list(again.graph_module.state_dict()) == list(result.graph_module.state_dict()), "the name is stable"
    mq.save(result, tmp_path / "m.safetensors", graph=True)
    assert torch.equal(mq.load(tmp_path / "m.safetensors").graph_module(x), result.graph_module(x))


# --- whatever a pass changed counts -----------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.leaky = nn.Linear(32, 32), nn.LeakyReLU(0.1)
        self.register_buffer("table", torch.arange(64.0))

    def forward(self, x):
        return torch.cat([self.leaky(self.fc(x)) + self.table[:32], x], 1)


def attach_codes(gm):
    for node, annotation in list(pending(gm)):
        codes = codes_of(tensors.get_tensor(gm, node), annotation, "test")
        set_annotation(node, replace(annotation, stored=codes))


def constant_in_a_list(gm):
    (cat,) = [n for n in gm.graph.nodes if n.name == "cat"]
    cat.args = ([*cat.args[0][:1], torch.full((3, 32), 0.1234567)], 1)


def call_of(gm, op):
    return next(n for n in gm.graph.nodes if n.op == op)


CHANGES = {
    "codes on an annotation": attach_codes,
    "an attribute of a module": lambda gm: setattr(gm.leaky, "negative_slope", 0.9),
    "a module's mode": lambda gm: gm.leaky.train(True),
    "a hook": lambda gm: gm.leaky.register_forward_hook(lambda *a: a[-1]) and None,
    "another view of one storage": lambda gm: tensors.attach(gm, "fc.bias", nn.Parameter(gm.fc.weight.detach()[1])),
    "a sub-graph": lambda gm: next(n for n in gm.sub.graph.nodes if n.op == "call_function").update_arg(1, 3.0),
    "a sub-graph's constant": lambda gm: tensors.attach(gm, "sub.k", torch.ones(1)),
    "the graph's meta": lambda gm: gm.meta.update(note="new"),
    "the calling convention": lambda gm: gm.graph.set_codegen(fx.graph.CodeGen()) or setattr(gm.graph._codegen, "n", 1),
    "a constant in a list": constant_in_a_list,
    "an argument's type": lambda gm: next(n for n in gm.graph.nodes if n.name == "cat").update_arg(1, True),
    "a sign of zero": lambda gm: next(n for n in gm.graph.nodes if n.name == "mul").update_arg(1, -0.0),
    "a node's type": lambda gm: setattr(call_of(gm, "placeholder"), "type", torch.Tensor),
    "a list in a node's meta": lambda gm: call_of(gm, "placeholder").meta["tags"].append("new"),
    "whether a buffer is saved": lambda gm: tensors.attach(gm, "table", gm.table, persistent=False),
    "a plain attribute": lambda gm: setattr(gm, "number", 5.0),
    "the values of a tensor": lambda gm: gm.table.add_(1),
}  # fmt: skip


def everything():
    gm = mq.capture(Everything().eval(), torch.randn(3, 32), method="symbolic")
    gm = mq.passes.SkipAnnotation(mq.QuantConfig(**ALL))(gm).graph_module
    (cat,) = [n for n in gm.graph.nodes if n.name == "cat"]
    gm.sub, gm.number = fx.symbolic_trace(lambda x: x * 2.0), 2.0
    gm.sub.register_buffer("k", torch.zeros(1))
    with gm.graph.inserting_after(cat):
        sub = gm.graph.call_module("sub", (cat,))
    with gm.graph.inserting_after(sub):
        number = gm.graph.get_attr("number")
    with gm.graph.inserting_after(number):
        product = gm.graph.call_function(torch.mul, (sub, 0.0))
    with gm.graph.inserting_after(product):
        total = gm.graph.call_function(torch.add, (product, number))
    next(n for n in gm.graph.nodes if n.op == "output").args = (total,)
    call_of(gm, "placeholder").meta["tags"] = ["old"]
    gm.recompile()
    return gm


@dataclass(frozen=True)
class Change(mq.Pass):
    what: str
    name = "change"

    def rewrite(self, gm):
        CHANGES[self.what](gm)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_any_kind_is_kept(what):
    """repr was compared: a pass that only attached codes, or set LeakyReLU(0.9), was judged to have changed nothing."""
    gm = everything()
    assert mq.passes.SkipAnnotation(mq.QuantConfig(**ALL))(gm).modified is False, "nothing is found where nothing is"
    before = fingerprint(gm)
    assert fingerprint(tensors.clone(gm)) == before
    result = Change(what)(gm)
    assert result.modified and result.graph_module is not gm
    assert fingerprint(result.graph_module) != before


def test_a_clone_keeps_the_mode_of_each_module():
    gm = everything()
    gm.leaky.train()
    assert tensors.clone(gm).leaky.training and not tensors.clone(gm).training


# --- passes take time in proportion to the model ----------------------------------------------------------------------


def calls(layers):
    """The functions that are called meanwhile: as good as a clock where work is done in Python, and always the same."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers))).eval()
    gm, count = mq.capture(model, method="symbolic"), itertools.count()
    sys.setprofile(lambda *_: next(count))
    try:
        mq.quantize(gm, calibration_data=[torch.randn(2, 16)], activations="int8", algorithm="rtn", **ALL)
    finally:
        sys.setprofile(None)
    return next(count)


@pytest.mark.slow
def test_four_times_the_layers_take_about_four_times_the_calls():
    """Every pass looked at all names, kinds or strings for each node: 31 s for 5,000 layers."""
    assert calls(240) < 4.6 * calls(60)
