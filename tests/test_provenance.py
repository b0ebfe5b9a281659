"""Every node knows which pass made it from which nodes, whatever the pass is."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.rewrite import add_call
from tests.harness import Snapshot, check_pass
from tests.models import MLP, ConvNet, Reused, TiedLM

SMALL = {"group_size": 32, "skip_param_threshold": 0, "default_skips": False, "algorithm": "rtn"}


def node_of(gm, name):
    return next(n for n in gm.graph.nodes if n.name == name)


def told(gm, name):
    return [(s.pass_name, s.action, s.node, s.sources, s.what) for s in mq.history(node_of(gm, name))]


def example(model):
    if isinstance(model, ConvNet):
        return torch.randn(2, 3, 8, 8)
    return torch.arange(8).view(2, 4) if isinstance(model, TiedLM) else torch.randn(4, 64)


@dataclass(frozen=True)
class Doubled(mq.Pass):
    """Puts two new calls behind each relu: one with the meta of the relu, and one without any."""

    name: ClassVar[str] = "doubled"

    def rewrite(self, gm):
        for node in gm.graph.find_nodes(op="call_function", target=nn.functional.relu):
            if any(user.target is torch.neg for user in node.users):
                continue
            users = list(node.users)
            with gm.graph.inserting_after(node):
                negated = add_call(gm, torch.neg, (node,), node)
            with gm.graph.inserting_after(negated):
                bare = gm.graph.call_function(torch.abs, (negated,))
            for user in users:
                user.replace_input_with(node, bare)


@dataclass(frozen=True)
class Zeroed(mq.Pass):
    """Puts a constant, without any meta, into a linear in the place of its bias."""

    name: ClassVar[str] = "zeroed"

    def rewrite(self, gm):
        node = node_of(gm, "linear")
        if node.args[2].target == "zero":
            return
        tensors.attach(gm, "zero", torch.zeros(128))
        with gm.graph.inserting_before(node):
            node.update_arg(2, gm.graph.get_attr("zero"))


def test_a_captured_graph_has_no_history_and_the_input_of_a_pass_keeps_its_own():
    gm = mq.capture(MLP().eval())
    keys = [set(n.meta) for n in gm.graph.nodes]
    before = Snapshot(gm)
    first = mq.passes.SkipAnnotation(mq.QuantConfig(group_size=32))(gm).graph_module
    before.check(gm)
    assert [set(n.meta) for n in gm.graph.nodes] == keys
    assert not any(mq.history(n) for n in gm.graph.nodes)
    histories = [mq.history(n) for n in first.graph.nodes]
    mq.passes.Int4GroupwiseLowering()(first)
    assert [mq.history(n) for n in first.graph.nodes] == histories


def test_the_story_of_a_weight_goes_on_in_what_replaces_it():
    out = mq.default_pipeline(mq.QuantConfig(group_size=32), [torch.randn(4, 64)])(
        mq.capture(MLP().eval())
    ).graph_module
    story = [
        ("skip-annotation", "changed", "fc1_weight", ("fc1_weight",), "decision"),
        ("calibration", "changed", "fc1_weight", ("fc1_weight",), "decision"),
    ]
    for name in ("fc1_weight_packed", "fc1_weight_scale"):
        assert told(out, name) == [*story, ("int4-lowering", "created", name, ("fc1_weight",), "")]
    assert told(out, "linear") == [
        ("observer-insertion", "changed", "linear", ("linear",), "inputs"),
        ("calibration", "changed", "linear", ("linear",), "inputs"),
        ("int4-lowering", "changed", "linear", ("linear",), "inputs"),
        ("dequant-fusion", "changed", "linear", ("linear",), "op"),
    ]
    fused = mq.history(node_of(out, "linear"))[-1]
    assert fused.before == "linear(x, fc1_weight_dequantized, fc1_bias)"
    assert fused.after.startswith("mono_quant_fx.int4_linear(x, fc1_weight_packed, fc1_weight_scale, None, fc1_bias")
    assert told(out, "fc1_bias") == told(out, "relu") == told(out, "x") == []


def test_what_stands_for_several_nodes_names_them_all_and_tells_their_stories():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x)], -1)

    config = mq.QuantConfig(group_size=32)
    out = mq.default_pipeline(config)(mq.capture(Pair().eval())).graph_module
    assert told(out, "linear_merged")[-1] == ("linear-merging", "created", "linear_merged", ("linear", "linear_1"), "")
    packed = told(out, "q_k_weight_packed")
    assert packed[-1][3] == ("q_weight_packed", "k_weight_packed")
    assert [s[2] for s in packed if s[0] == "int4-lowering"] == ["q_weight_packed", "k_weight_packed"]
    assert [s[2] for s in packed if s[0] == "skip-annotation"] == ["q_weight", "k_weight"]
    assert told(out, "linear_1")[-2:] == [
        ("linear-merging", "changed", "linear_1", ("linear_1",), "op"),
        ("linear-merging", "changed", "linear_1", ("linear_1",), "decision"),
    ]
    back = mq.dequantize_model(out)
    for name in ("linear", "linear_1"):
        assert told(back, name)[-2:] == [
            ("dequantize-model", "changed", name, (name,), "op"),
            ("dequantize-model", "changed", name, (name,), "decision"),
        ]


def test_a_users_pass_needs_no_word_of_its_own():
    out = check_pass(Doubled(), mq.capture(MLP().eval()))
    assert told(out, "neg") == [("doubled", "created", "neg", ("relu",), "")]
    assert told(out, "abs_1") == [("doubled", "created", "abs_1", ("relu",), "")], "by what it reads"
    assert told(out, "linear_1") == [("doubled", "changed", "linear_1", ("linear_1",), "inputs")]
    step = mq.history(node_of(out, "linear_1"))[0]
    assert (step.before, step.after) == ("relu", "abs_1")


def test_a_constant_without_meta_stands_for_what_reads_it():
    out = check_pass(Zeroed(), mq.capture(MLP().eval()))
    assert told(out, "zero") == [("zeroed", "created", "zero", ("linear",), "")]


def test_a_new_value_and_a_new_note_are_changes():
    @dataclass(frozen=True)
    class Halved(mq.Pass):
        name: ClassVar[str] = "halved"

        def rewrite(self, gm):
            tensors.attach(gm, "fc1.bias", nn.Parameter(gm.fc1.bias.detach() / 2))
            node_of(gm, "relu").meta["note"] = "seen"

    out = Halved()(mq.capture(MLP().eval())).graph_module
    assert told(out, "fc1_bias") == [("halved", "changed", "fc1_bias", ("fc1_bias",), "value")]
    assert told(out, "relu") == [("halved", "changed", "relu", ("relu",), "meta")]
    assert [str(s) for s in mq.history(node_of(out, "relu"))] == ["halved changed the meta of relu: note"]
    assert not told(out, "linear")


def test_requires_grad_alone_is_no_new_value():
    out = mq.passes.Int4GroupwiseLowering()(
        mq.passes.SkipAnnotation(mq.QuantConfig(group_size=32))(mq.capture(MLP().eval()))
    ).graph_module
    assert not out.fc1.bias.requires_grad
    assert told(out, "fc1_bias") == []


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("model", [MLP, ConvNet, Reused, TiedLM])
def test_every_pass_of_the_pipeline_tells_where_each_node_is_from(model, activations):
    model = model().eval()
    x = example(model)
    config = mq.QuantConfig(**SMALL, activations=activations, bias_correction=True)
    gm = mq.capture(model)
    for pass_ in mq.default_pipeline(config, [x]).passes:
        is_idle = not pass_(gm).modified
        gm = check_pass(pass_, gm, modified=not is_idle)
    captured = {n.name for n in mq.capture(model).graph.nodes}
    for node in gm.graph.nodes:
        assert mq.history(node) or node.name in captured, node.name


@pytest.mark.parametrize("model", [MLP, TiedLM])
def test_histories_are_plain_data_and_stay_through_copies_and_a_second_pipeline(model):
    model = model().eval()
    pipeline = mq.default_pipeline(mq.QuantConfig(**SMALL), [example(model)])
    out = pipeline(mq.capture(model)).graph_module
    histories = [mq.history(n) for n in out.graph.nodes]
    assert any(histories)
    for twin in (copy.deepcopy(out), tensors.clone(out), pipeline(out).graph_module):
        assert [mq.history(n) for n in twin.graph.nodes] == histories
    assert not [key for n in out.graph.nodes for key in n.meta if "mark" in key]
    for step in {s for h in histories for s in h}:
        assert mq.Step(**dataclasses.asdict(step)) == step
        assert all(isinstance(v, str) for v in (*dataclasses.astuple(step)[:3], *step.sources))
        assert max(len(step.before), len(step.after)) <= 160


def test_a_failed_pass_leaves_no_mark():
    @dataclass(frozen=True)
    class Failing(mq.Pass):
        name: ClassVar[str] = "failing"

        def rewrite(self, gm):
            raise KeyError("lost")

    gm = mq.capture(MLP().eval())
    keys = [set(n.meta) for n in gm.graph.nodes]
    with pytest.raises(mq.PassError):
        Failing()(gm)
    assert [set(n.meta) for n in gm.graph.nodes] == keys


def test_a_step_in_words():
    made, changed = (
        mq.Step("p", "created", "b", ("a",), after="neg(a)"),
        mq.Step("p", "changed", "c", ("c",), "inputs", "a", "b"),
    )
    assert str(made) == "p made b from a: neg(a)"
    assert str(changed) == "p changed the inputs of c: a -> b"
