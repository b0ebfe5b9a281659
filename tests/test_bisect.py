"""Pipeline.bisect names exactly the pass, and the node, that were broken on purpose."""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.merging import LinearCall
from mono_quant_fx.pass_base import PassResult
from tests.harness import Snapshot
from tests.models import MLP, ConvNet, Reused, TiedLM

#: What sound INT8 keeps in the models below, and what a broken pass does not.
THRESHOLD_DB = 25.0
INT8 = {"bits": 8, "skip_param_threshold": 0, "default_skips": False, "algorithm": "rtn"}


class Tower(nn.Module):
    """Linears of one width with skips around them, so that biases can be swapped and q and k be merged."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.mix, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        y = torch.tanh(self.q(x)) * self.k(x)
        return self.out(torch.tanh(self.mix(y)) + x)


@dataclass(frozen=True)
class Scaled(mq.Pass):
    """A broken pass: multiplies one stored tensor."""

    target: str
    factor: float = 1.5
    name: ClassVar[str] = "scaled"

    def rewrite(self, gm):
        value = tensors.get_attribute(gm, self.target)
        kind = (lambda t: nn.Parameter(t, requires_grad=False)) if isinstance(value, nn.Parameter) else torch.clone
        tensors.attach(gm, self.target, kind(value.detach() * self.factor))


@dataclass(frozen=True)
class Swapped(mq.Pass):
    """A broken pass: two ops read each other's bias."""

    first: str
    second: str
    name: ClassVar[str] = "swapped"

    def rewrite(self, gm):
        a, b = (next(n for n in gm.graph.nodes if n.name == name) for name in (self.first, self.second))
        a.target, b.target = b.target, a.target


@dataclass(frozen=True)
class WithoutTanh(mq.Pass):
    """A broken pass: what read the first tanh reads its input."""

    name: ClassVar[str] = "without-tanh"

    def rewrite(self, gm):
        node = next(n for n in gm.graph.nodes if n.target is torch.tanh)
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)


def spoiled(pipeline, broken, behind):
    """The pipeline with one more pass, behind the one of that name."""
    at = next(i for i, p in enumerate(pipeline.passes) if p.name == behind) + 1
    return mq.Pipeline((*pipeline.passes[:at], broken, *pipeline.passes[at:]))


def data_for(model):
    if isinstance(model, ConvNet):
        return [torch.randn(2, 3, 8, 8) for _ in range(2)]
    if isinstance(model, TiedLM):
        return [torch.randint(0, 40, (4, 6)) for _ in range(2)]
    return [torch.randn(16, 64) for _ in range(2)]


def pipeline_for(batches, **config):
    return mq.default_pipeline(mq.QuantConfig(**{**INT8, **config}), batches)


CASES = [
    (MLP, "int4-lowering", "fc1.weight_scale", "linear"),
    (MLP, "dequant-fusion", "fc2.weight_scale", "linear_1"),
    (MLP, "skip-annotation", "fc1.weight", "linear"),
    (ConvNet, "int4-lowering", "up.weight_scale", "conv_transpose2d"),
    (ConvNet, "dequant-fusion", "depthwise.weight_scale", "conv2d_1"),
    (ConvNet, "calibration", "fc.weight", "linear"),
    (Tower, "int4-lowering", "mix.weight_scale", "linear_2"),
    (Tower, "dequant-fusion", "k.weight_scale", "linear_1"),
    (Tower, "linear-merging", "q_k.weight_scale", "linear_merged"),
    (Tower, "observer-insertion", "out.bias", "linear_3"),
]


@pytest.mark.parametrize(("model", "behind", "target", "node"), CASES)
def test_a_pass_that_scales_a_constant_is_found_with_the_op_that_reads_it(model, behind, target, node):
    model = model().eval()
    gm, batches = mq.capture(model), data_for(model)
    before = Snapshot(gm)
    factor = 10.0 if target.endswith("bias") else 1.5
    found = mq.bisect(spoiled(pipeline_for(batches), Scaled(target, factor), behind), gm, batches, THRESHOLD_DB)
    before.check(gm)
    assert (found.culprit_pass, found.culprit_node) == ("scaled", node), found
    assert found.steps[found.culprit_index].output_db < THRESHOLD_DB <= found.steps[found.culprit_index - 1].output_db
    assert found.first_node == ("linear" if node == "linear_merged" else node)
    assert found.suspects[0].output_db == min(s.output_db for s in found.suspects)


@pytest.mark.parametrize("behind", ["skip-annotation", "int4-lowering", "dequant-fusion"])
@pytest.mark.parametrize("pair", [("q", "mix"), ("k", "out"), ("mix", "out")])
def test_swapped_biases_are_found_at_the_op_that_they_cost_most(behind, pair):
    model = Tower().eval()
    with torch.no_grad():
        getattr(model, pair[1]).bias.mul_(20)
    gm, batches = mq.capture(model), data_for(model)
    names = [f"{name}_bias" for name in pair]
    ops = {"q": "linear", "k": "linear_1", "mix": "linear_2", "out": "linear_3"}
    found = mq.bisect(spoiled(pipeline_for(batches), Swapped(*names), behind), gm, batches, THRESHOLD_DB)
    assert found.culprit_pass == "swapped"
    assert {s.node for s in found.suspects} == {ops[name] for name in pair}
    costs = {ops[own]: _cost_of_bias(model, own, other, batches) for own, other in (pair, pair[::-1])}
    assert found.culprit_node == min(costs, key=costs.get), (costs, found)
    assert found.first_node == ops[pair[0]]


def _cost_of_bias(model, own, other, batches):
    """Output SQNR of the float model when one linear alone has another's bias."""
    kept, x = getattr(model, own).bias, torch.cat(batches)
    with torch.no_grad():
        expected = model(x)
        getattr(model, own).bias = getattr(model, other).bias
        actual = model(x)
    getattr(model, own).bias = kept
    return mq.sqnr_db(expected, actual)


def test_an_op_left_out_is_found_at_its_reader():
    model = Reused().eval()
    batches = data_for(model)
    found = mq.bisect(spoiled(pipeline_for(batches), WithoutTanh(), "int4-lowering"), mq.capture(model), batches, 25.0)
    assert (found.culprit_pass, found.culprit_node) == ("without-tanh", "add"), found
    assert {s.node for s in found.suspects} == {"linear_1", "add"}
    assert found.first_node == "linear_1"


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("model", [MLP, ConvNet, Reused, TiedLM, Tower])
def test_a_sound_pipeline_has_no_culprit(model, activations):
    model = model().eval()
    batches = data_for(model)
    pipeline = pipeline_for(batches, activations=activations)
    found = mq.bisect(pipeline, mq.capture(model), batches, THRESHOLD_DB)
    assert found.culprit_pass is found.culprit_node is found.culprit_index is None
    assert [s.pass_name for s in found.steps] == [p.name for p in pipeline.passes]
    assert found.verdict == "no loss: the output stays at or above 25 dB after every pass"
    changed = [s.output_db for s in found.steps if s.pass_name == "int4-lowering"]
    assert THRESHOLD_DB < changed[0] < 100


def test_the_layer_that_rounding_costs_most_is_found_as_brute_force_finds_it():
    model = Tower().eval()
    with torch.no_grad():
        model.mix.weight[:, 0] *= 40  # an outlier a row: its neighbours are rounded away
    gm, batches = mq.capture(model), data_for(model)
    found = mq.bisect(mq.default_pipeline(mq.QuantConfig(group_size=64)), gm, batches, 40.0)
    assert found.culprit_pass == "int4-lowering"
    alone = {}
    for node, module in (("linear", "q"), ("linear_1", "k"), ("linear_2", "mix"), ("linear_3", "out")):
        others = [m for m in ("q", "k", "mix", "out") if m != module]
        config = mq.QuantConfig(group_size=64, skip_layer_names=others)
        lowered = mq.Pipeline((mq.passes.SkipAnnotation(config), mq.passes.Int4GroupwiseLowering()))(gm)
        x = torch.cat(batches)
        alone[node] = mq.sqnr_db(gm(x), lowered.graph_module(x))
    assert {s.node: s.output_db for s in found.suspects} == pytest.approx(alone, abs=1e-3)
    assert found.culprit_node == min(alone, key=alone.get)


def test_two_runs_say_the_same_and_the_words_are_these():
    gm, batches = mq.capture(MLP().eval()), [torch.randn(8, 64)]
    pipeline = spoiled(pipeline_for(batches), Scaled("fc1.weight_scale"), "int4-lowering")
    a, b = (mq.bisect(pipeline, gm, batches, THRESHOLD_DB) for _ in range(2))
    assert a == b and str(a) == str(b)
    db = a.steps[a.culprit_index].output_db
    assert str(a).splitlines()[0] == (
        f"scaled (pass 5 of 7) takes the output to {db:.1f} dB, below 25 dB; its change of linear costs most, and the "
        "first node below is linear"
    )
    assert sum(line.endswith("<-") for line in str(a).splitlines()) == 1
    assert all(s.seconds > 0 for s in a.steps)
    page = a._repr_html_()
    assert page.count("<table>") == 2 and "scaled" in page


def test_names_are_escaped_in_html():
    step = mq.BisectionStep("<b>", 1.0, True, 0.0)
    page = mq.Bisection(
        2.0, (step,), 1, 0, "<b>", "<i>", "<i>", (mq.Suspect("<i>", "<u>", "", 1.0, 1.0),)
    )._repr_html_()
    assert not [tag for tag in ("<b>", "<i>", "<u>") if tag in page]


def test_what_only_the_output_says_is_the_outputs_fault():
    @dataclass(frozen=True)
    class Rewired(mq.Pass):
        name: ClassVar[str] = "rewired"

        def rewrite(self, gm):
            (output,) = gm.graph.find_nodes(op="output")
            last = output.all_input_nodes[0]
            output.replace_input_with(last, last.all_input_nodes[0])

    gm = mq.capture(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval())
    found = mq.bisect(mq.Pipeline((Rewired(),)), gm, [torch.randn(4, 8) * 5], 30.0)
    assert (found.culprit_pass, found.culprit_node, found.suspects) == ("rewired", "output", ())


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf, None, "20", True])
def test_a_threshold_that_is_no_finite_number_is_refused(threshold):
    with pytest.raises(mq.ConfigError, match=r"threshold_db=.*: a finite number of dB is needed"):
        mq.bisect(mq.default_pipeline(), mq.capture(MLP().eval()), [torch.randn(2, 64)], threshold)


class Indices(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


CALLS = itertools.count()


@torch.fx.wrap
def drifting(x):
    """Other than at the call before, and not by torch's generator, which bisect sets back."""
    return x + next(CALLS)


class Noisy(nn.Module):
    def forward(self, x):
        return drifting(x)


@pytest.mark.parametrize(
    ("model", "data", "error", "words"),
    [
        (MLP, [], mq.CalibrationError, "calibration_data is empty"),
        (MLP, torch.randn(2, 64), mq.CalibrationError, r"write \[batch\]"),
        (MLP, [torch.randn(2, 63)], mq.CalibrationError, "batch 0 fails at node 'linear'"),
        (MLP, [(torch.randn(2, 64), 1)], mq.CalibrationError, "prepare_batch="),
        (Indices, [torch.randn(2, 64)], mq.PreconditionError, "holds no floating-point tensor"),
        (Noisy, [torch.randn(2, 64)], mq.PreconditionError, "another output when it runs a second time"),
    ],
)
def test_data_and_graphs_that_cannot_be_measured_are_refused(model, data, error, words):
    with pytest.raises(error, match=words):
        mq.bisect(mq.default_pipeline(), mq.capture(model().eval()), data, 20.0)


def test_a_module_is_refused_and_a_pass_result_and_prepare_batch_are_taken():
    with pytest.raises(mq.PreconditionError, match=r"bisect: a GraphModule is needed, not MLP; mq.capture\(model\)"):
        mq.bisect(mq.default_pipeline(), MLP(), [torch.randn(2, 64)], 20.0)
    gm = mq.capture(MLP().eval())
    data = [{"x": torch.randn(2, 64), "y": 1}]
    found = mq.bisect(mq.Pipeline(()), PassResult(gm, False), data, 20.0, prepare_batch=lambda batch: batch["x"])
    assert (found.steps, found.culprit_pass, found.samples) == ((), None, 2)


def test_a_pass_whose_graph_does_not_run_is_named():
    @dataclass(frozen=True)
    class Cut(mq.Pass):
        name: ClassVar[str] = "cut"

        def rewrite(self, gm):
            tensors.attach(gm, "fc2.weight", nn.Parameter(gm.fc2.weight[:, :-1].detach()))

    @dataclass(frozen=True)
    class Narrow(mq.Pass):
        name: ClassVar[str] = "narrow"

        def rewrite(self, gm):
            tensors.attach(gm, "fc2.weight", nn.Parameter(gm.fc2.weight[:-1].detach()))
            tensors.attach(gm, "fc2.bias", nn.Parameter(gm.fc2.bias[:-1].detach()))

    gm, data = mq.capture(MLP().eval()), [torch.randn(2, 64)]
    with pytest.raises(mq.CalibrationError, match=r"bisect: after cut the graph does not run.*at node 'linear_1'"):
        mq.bisect(mq.Pipeline((Cut(),)), gm, data, 20.0)
    with pytest.raises(mq.CalibrationError, match=r"bisect: after narrow .*the outputs' shapes differ"):
        mq.bisect(mq.Pipeline((Narrow(),)), gm, data, 20.0)


def test_the_merged_op_that_is_blamed_computes_both():
    gm, batches = mq.capture(Tower().eval()), [torch.randn(8, 64)]
    out = pipeline_for(batches)(gm).graph_module
    (whole,) = [n for n in out.graph.nodes if n.name == "linear_merged"]
    assert LinearCall.read(whole).outputs(out) == 128


class Deep(nn.Module):
    """Ten linears behind skips, of which only the last says much to the output."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(10))
        self.head = nn.Linear(64, 16)

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.01 * layer(x)
        return self.head(x)


def test_the_costliest_node_is_found_among_many_that_are_worse_by_themselves():
    model = Deep().eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.weight[:, 0] *= 40
    found = mq.bisect(
        mq.default_pipeline(mq.QuantConfig(group_size=64)), mq.capture(model), [torch.randn(16, 64)], 40.0
    )
    assert (found.culprit_pass, found.culprit_node) == ("int4-lowering", "linear_10"), found
    assert len(found.suspects) == 8
    assert found.suspects[0].local_db > max(s.local_db for s in found.suspects[1:])


def test_a_graph_that_writes_its_state_is_bisected_without_a_trace():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.register_buffer("seen", torch.zeros(64))

        def forward(self, x):
            self.seen.add_(self.a(x).mean(0))
            return self.b(x + self.seen)

    gm, batches = mq.capture(Running().eval(), torch.randn(4, 64), method="export"), data_for(None)
    before = Snapshot(gm)
    found = mq.bisect(spoiled(pipeline_for(batches), Scaled("b.weight_scale"), "dequant-fusion"), gm, batches, 25.0)
    before.check(gm)
    assert found.culprit_pass == "scaled"
    assert [s.module for s in found.suspects] == ["b"]
